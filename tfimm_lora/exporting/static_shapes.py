"""Static shapes in a graph, for all sizes that do not depend on the batch size.

Models compute sizes at run time (``tf.shape``). If the batch size is unknown, the graph then
has other unknown sizes too: TFLite finds convolutions with an unknown number of channels, which
it does not support, and tf2onnx writes reshapes that onnxruntime rejects. This module rebuilds
the graph, operation by operation, with the sizes that are equal for two different batch sizes
as constants. It also replaces operations that TFLite lacks by equivalent ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: The batch sizes to compare. Their halves and doubles differ too.
_BATCHES = (5, 7)

#: The operations that read a variable.
_READS = ("ReadVariableOp", "ResourceGather")


def with_static_shapes(traced: Any) -> Callable[..., list[Any]] | None:
    """Rebuild a function with static shapes.

    Args:
        traced: A concrete function of tensors whose only unknown dimension is the batch.

    Returns:
        A function to be traced, from tensors to the list of outputs. None if the graph cannot
        be rebuilt, because it has functions (such as loops) or resources other than variables.
    """
    sources = _sources(traced)
    operations = traced.graph.get_operations()
    if sources is None or any(_calls_functions(op) for op in operations):
        return None
    shapes = _common_shapes(*(_shapes_for(traced, sources, batch) for batch in _BATCHES))

    def run(*inputs: Any) -> list[Any]:
        arguments = dict(zip((t.name for t in _arguments(traced)), inputs))
        return _build(traced, {**sources, **arguments}, shapes)

    return run


def _arguments(traced: Any) -> list[Any]:
    captured = {inside.name for _, inside in traced.graph.captures}
    return [t for t in traced.inputs if t.name not in captured]


def _sources(traced: Any) -> dict[str, Any] | None:
    """The variables and constants that a graph captures, by their names in the graph."""
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


def _shapes_for(traced: Any, sources: dict[str, Any], batch: int) -> dict[str, Any]:
    """The shapes of all tensors for one batch size, without running the graph."""
    import tensorflow as tf

    def placeholder(value: Any) -> Any:
        if value.dtype.is_integer and not isinstance(value, tf.Variable):
            return tf.constant(value.numpy())  # may determine a shape
        return tf.compat.v1.placeholder(value.dtype, value.shape)

    with tf.Graph().as_default():
        tensors = {name: placeholder(value) for name, value in sources.items()}
        for t in _arguments(traced):
            shape = [batch if size is None else size for size in t.shape]
            tensors[t.name] = tf.compat.v1.placeholder(t.dtype, shape)
        _build(traced, tensors, None)
        return {name: tensor.shape for name, tensor in tensors.items()}


def _common_shapes(
    one: dict[str, Any], other: dict[str, Any]
) -> dict[str, list[int | None] | None]:
    """The shapes of tensors by name, with None for sizes that depend on the batch size."""

    def common(a: Any, b: Any) -> list[int | None] | None:
        if a.rank is None or a.rank != b.rank:
            return None
        return [m if m == n else None for m, n in zip(a.as_list(), b.as_list())]

    return {name: common(one[name], other[name]) for name in one}


def _build(traced: Any, tensors: dict[str, Any], shapes: dict[str, Any] | None) -> list[Any]:
    """Build all operations in the current graph and return the outputs.

    Args:
        traced: The concrete function to rebuild.
        tensors: Inputs and variables by their names in ``traced``. All other tensors are added.
        shapes: The known shapes of the tensors, or None if they are not known yet.
    """
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    for op in traced.graph.get_operations():
        if op.type == "Placeholder":
            continue
        inputs = [tensors[t.name] for t in op.inputs]
        rule = _RULES.get(op.type)
        outputs = None
        if rule is not None:
            outputs = rule(tf, op, inputs, shapes and shapes.get(op.outputs[0].name))
        if outputs is None:
            attrs = {k: v for k, v in op.node_def.attr.items() if not k.startswith("_")}
            dtypes = [t.dtype for t in op.outputs]
            built = graph.create_op(op.type, inputs, dtypes, None, op.name, attrs, op.op_def)
            outputs = built.outputs
        for old, new in zip(op.outputs, outputs):
            new.set_shape(old.shape)
            tensors[old.name] = new
    return [tensors[t.name] for t in traced.outputs]


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
    """A roll as a concatenation of slices, for the shifted windows of Swin."""
    x, *numbers = inputs
    shifts, axes = (tf.get_static_value(number) for number in numbers)
    if shape is None or shifts is None or axes is None:
        return None
    for shift, axis in zip(shifts.ravel().tolist(), axes.ravel().tolist()):
        if shape[axis] is None:
            return None
        tail = shift % shape[axis]
        if tail:
            slices = tf.split(x, [shape[axis] - tail, tail], axis)
            x = tf.concat(slices[::-1], axis)
    return [x]


_RULES = {
    "ReadVariableOp": _read,
    "ResourceGather": _gather_from_variable,
    "Reshape": _reshape,
    "Roll": _roll,
}
