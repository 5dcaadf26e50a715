"""Sizes that do not depend on the batch, written into a graph as numbers.

Models ask for sizes while they run (``tf.shape``), so that with a batch of any size a graph
knows little about the other sides either. TFLite then finds a convolution of unknown channels,
which it does not have, and tf2onnx writes reshapes that onnxruntime refuses. Here the graph is
built again, operation by operation, with sizes that are the same for two different batches as
numbers. Operations that TFLite lacks and that are a few others are written as those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Sizes of batches to compare. Halves and doubles of the two are different, too.
_BATCHES = (5, 7)

#: The operations that read a variable.
_READS = ("ReadVariableOp", "ResourceGather")


def with_known_sizes(traced: Any) -> Callable[..., list[Any]] | None:
    """The same computation with known sizes.

    Args:
        traced: A concrete function of tensors whose first side is the batch.

    Returns:
        A function to be traced, from tensors to the list of the outputs; None if the graph
        holds what cannot be built again so: functions (as loops have) and resources that are
        not variables.
    """
    sources = _sources(traced)
    operations = traced.graph.get_operations()
    if sources is None or any(_calls_functions(op) for op in operations):
        return None
    sizes = _agreeing(*(_sizes_at(traced, sources, batch) for batch in _BATCHES))

    def run(*inputs: Any) -> list[Any]:
        made = dict(zip((t.name for t in _arguments(traced)), inputs))
        return _build(traced, {**sources, **made}, sizes)

    return run


def _arguments(traced: Any) -> list[Any]:
    captured = {inside.name for _, inside in traced.graph.captures}
    return [t for t in traced.inputs if t.name not in captured]


def _sources(traced: Any) -> dict[str, Any] | None:
    """What comes into a graph from outside by the name it has there: variables, constants."""
    variables = {id(v.handle): v for v in traced.graph.variables}
    sources = {}
    for outside, inside in traced.graph.captures:
        if inside.dtype.name != "resource":
            sources[inside.name] = outside
        elif id(outside) in variables and all(x.type in _READS for x in inside.consumers()):
            sources[inside.name] = variables[id(outside)]
        else:
            return None
    return sources


def _calls_functions(op: Any) -> bool:
    return any(attr.HasField("func") or attr.list.func for attr in op.node_def.attr.values())


def _sizes_at(traced: Any, sources: dict[str, Any], batch: int) -> dict[str, Any]:
    """The shapes of all tensors for one size of the batch; nothing is computed."""
    import tensorflow as tf

    def stand_in(value: Any) -> Any:
        if value.dtype.is_integer and not isinstance(value, tf.Variable):
            return tf.constant(value.numpy())  # may say what a size is
        return tf.compat.v1.placeholder(value.dtype, value.shape)

    with tf.Graph().as_default():
        made = {name: stand_in(value) for name, value in sources.items()}
        for t in _arguments(traced):
            made[t.name] = tf.compat.v1.placeholder(t.dtype, [batch, *t.shape[1:]])
        _build(traced, made, None)
        return {name: tensor.shape for name, tensor in made.items()}


def _agreeing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[int | None] | None]:
    """The shapes of tensors by name, None for sides that depend on the batch."""

    def common(a: Any, b: Any) -> list[int | None] | None:
        if a.rank is None or a.rank != b.rank:
            return None
        return [m if m == n else None for m, n in zip(a.as_list(), b.as_list())]

    return {name: common(one[name], other[name]) for name in one}


def _build(traced: Any, made: dict[str, Any], sizes: dict[str, Any] | None) -> list[Any]:
    """Build all operations in the graph of now, and give the outputs.

    Args:
        traced: The concrete function to follow.
        made: Tensors and variables by the names that they have there. The others are added.
        sizes: What is known of the shapes of its tensors; None where that is to be found out.
    """
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    for op in traced.graph.get_operations():
        if op.type == "Placeholder":
            continue
        inputs = [made[t.name] for t in op.inputs]
        rule = _RULES.get(op.type)
        outputs = None
        if rule is not None:
            outputs = rule(tf, op, inputs, sizes and sizes.get(op.outputs[0].name))
        if outputs is None:
            attrs = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
            dtypes = [t.dtype for t in op.outputs]
            built = graph.create_op(op.type, inputs, dtypes, None, op.name, attrs, op.op_def)
            outputs = built.outputs
        for before, now in zip(op.outputs, outputs):
            now.set_shape(before.shape)
            made[before.name] = now
    return [made[t.name] for t in traced.outputs]


def _read(tf: Any, op: Any, inputs: list[Any], shape: Any) -> list[Any]:
    return [tf.convert_to_tensor(inputs[0])]


def _gather_from_variable(tf: Any, op: Any, inputs: list[Any], shape: Any) -> list[Any]:
    variable, indices = inputs
    value = tf.convert_to_tensor(variable)
    return [tf.gather(value, indices, batch_dims=op.get_attr("batch_dims"))]


def _reshape(tf: Any, op: Any, inputs: list[Any], shape: Any) -> list[Any] | None:
    if shape is None or shape.count(None) > 1 or 0 in shape:
        return None
    return [tf.reshape(inputs[0], [-1 if size is None else size for size in shape])]


def _roll(tf: Any, op: Any, inputs: list[Any], shape: Any) -> list[Any] | None:
    """As slices put together: windows that are shifted, in Swin."""
    x, *numbers = inputs
    shifts, axes = (tf.get_static_value(number) for number in numbers)
    if shape is None or shifts is None or axes is None:
        return None
    for shift, axis in zip(shifts.ravel().tolist(), axes.ravel().tolist()):
        if shape[axis] is None:
            return None
        back = shift % shape[axis]
        if back:
            parts = tf.split(x, [shape[axis] - back, back], axis)
            x = tf.concat(parts[::-1], axis)
    return [x]


_RULES = {
    "ReadVariableOp": _read,
    "ResourceGather": _gather_from_variable,
    "Reshape": _reshape,
    "Roll": _roll,
}
