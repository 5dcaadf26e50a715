"""Gradients that compute a function again, on TensorFlow."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context, record

from tfimm_lora.backend import recompute
from tfimm_lora.backend.interface import Layer, Tensor

#: The layers that were checked while they ran eagerly, with training off or on.
_checked: weakref.WeakKeyDictionary[Layer, set[bool]] = weakref.WeakKeyDictionary()

#: Operations that draw from a ``tf.random.Generator``.
_DRAWS = ("RngReadAndSkip", "RngSkip", "StatefulUniform", "StatefulStandardNormal")
#: Operations that assign to variables.
_ASSIGNS = ("Assign", "ResourceApply", "ResourceScatter", "ResourceStridedSliceAssign")
#: The graphs of branches and loops, whose tensors the backward pass outside does not have.
_INNER_GRAPHS = ("CondBranchFuncGraph", "WhileCondFuncGraph", "WhileBodyFuncGraph")


def recomputed(
    layer: Layer,
    function: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    trained: Iterable[tf.Variable],
    training: bool,
) -> list[Tensor]:
    """``function(*tensors)``. Its gradient calls it again instead of keeping what it computed.

    ``tf.recompute_grad`` does the same with the gradients of all variables, whether they are
    frozen or not.

    Args:
        layer: The layer whose call the function is.
        function: It is called twice.
        tensors: The tensors that may have a gradient.
        trained: The variables that may have one.
        training: Whether the layer is called in training.

    Raises:
        ValueError: if the function would not compute the same again.
    """
    handles = {id(variable.handle) for variable in trained}

    def call(*tensors: Tensor) -> Any:
        with record.stop_recording():
            outputs = _checked_outputs(layer, function, tensors, training)

        def grad(*gradients: Tensor, variables: Sequence[tf.Variable] = ()) -> Any:
            wanted = [v for v in variables if id(v.handle) in handles]
            inputs = _after(gradients, tensors)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([x for x in inputs if _has_gradient(x)])
                tape.watch(wanted)
                with tf.control_dependencies(gradients):  # also what the tensors do not enter
                    again = function(*inputs)
            *found, by_variable = tape.gradient(
                again, [*inputs, wanted], output_gradients=list(gradients)
            )
            # No variable is assigned to before it was read again.
            with tf.control_dependencies(again):
                by_variable = [None if g is None else tf.identity(g) for g in by_variable]
            of = {id(v.handle): g for v, g in zip(wanted, by_variable)}
            return found, [of.get(id(v.handle)) for v in variables]

        def without_variables(*gradients: Tensor) -> Any:
            return grad(*gradients)[0]

        return outputs, grad if handles else without_variables

    outputs: list[Tensor] = tf.custom_gradient(call)(*tensors)
    return outputs


def _after(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, in a graph as something that is computed from a gradient.

    Otherwise the function might be computed again at once, or taken for what was computed
    before. XLA ignores control dependencies.
    """
    gradient = next((g for g in gradients if _has_gradient(g)), None)
    if tf.executing_eagerly() or gradient is None:
        return [tf.identity(x) for x in tensors]
    first = tf.math.real(tf.reshape(gradient, (-1,))[:1])
    # It is NaN or zero, which nothing but running the graph shows.
    zero = tf.reduce_sum(tf.where(tf.math.is_nan(first), first, tf.zeros_like(first)))
    return [x + tf.cast(zero, x.dtype) if _has_gradient(x) else x for x in tensors]


def _has_gradient(x: Tensor) -> bool:
    return bool(x.dtype.is_floating or x.dtype.is_complex)


def _checked_outputs(
    layer: Layer,
    function: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    training: bool,
) -> list[Tensor]:
    """The outputs of a function, all operations of which can be repeated."""
    if tf.executing_eagerly():
        outputs = function(*tensors)
        done = _checked.setdefault(layer, set())
        if training not in done:
            specs = [tf.TensorSpec.from_tensor(x) for x in tensors]
            traced = tf.function(function, autograph=False).get_concrete_function(*specs)
            _check_operations(layer, traced.graph.get_operations())
            done.add(training)
        return outputs
    graph = tf.compat.v1.get_default_graph()
    if type(graph).__name__ in _INNER_GRAPHS:
        raise recompute.refusal(
            layer.name, "is called in a tf.cond or a loop", "a call outside of them"
        )
    before = len(graph.get_operations())
    outputs = function(*tensors)
    _check_operations(layer, graph.get_operations()[before:])
    return outputs


def _check_operations(layer: Layer, operations: Iterable[tf.Operation]) -> None:
    for node in _nodes(operation.node_def for operation in operations):
        # Operations whose state is in a kernel have two attributes for the seed.
        draws = "seed2" in node.attr or node.op.startswith(_DRAWS)
        if draws or node.op.startswith(_ASSIGNS):
            raise recompute.changed_state(layer.name, f"'{node.name}' ({node.op})")


def _nodes(nodes: Iterable[Any]) -> Iterator[Any]:
    """The nodes, and those of the functions that they call."""
    for node in nodes:
        yield node
        for attribute in node.attr.values():
            for called in (attribute.func, *attribute.list.func):
                if called.name:
                    yield from _nodes(context.get_function_def(called.name).node_def)
