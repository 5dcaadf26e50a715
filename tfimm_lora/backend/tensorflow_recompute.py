"""Gradients that compute a function again, on TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from tfimm_lora.backend.interface import Tensor


def recomputed(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    trained: Iterable[tf.Variable],
    name: str,
) -> Any:
    """``function(*tensors)``. Its gradient calls it again instead of keeping what it computed.

    ``tf.recompute_grad`` does the same with the gradients of all variables, whether they are
    frozen or not.

    Args:
        function: It is called twice, and computes the same both times.
        tensors: The tensors that may have a gradient.
        trained: The variables that have one.
        name: The name of the layer, for errors.
    """
    handles = {id(variable.handle) for variable in trained}

    def call(*tensors: Tensor) -> Any:
        with record.stop_recording(), _repeatable(name):
            outputs = function(*tensors)

        def grad(*gradients: Tensor, variables: Sequence[tf.Variable] = ()) -> Any:
            wanted = [v for v in variables if id(v.handle) in handles]
            inputs = _after(gradients[0], tensors)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch([x for x in inputs if _has_gradient(x)])
                tape.watch(wanted)
                with tf.control_dependencies(gradients):  # also what the tensors do not enter
                    again = function(*inputs)
            outputs = tf.nest.flatten(again)
            *found, by_variable = tape.gradient(
                outputs, [*inputs, wanted], output_gradients=list(gradients)
            )
            # No variable is assigned to before it was read again.
            with tf.control_dependencies(outputs):
                by_variable = [None if g is None else tf.identity(g) for g in by_variable]
            of = {id(v.handle): g for v, g in zip(wanted, by_variable)}
            return found, [of.get(id(v.handle)) for v in variables]

        def without_variables(*gradients: Tensor) -> Any:
            return grad(*gradients)[0]

        return outputs, grad if handles else without_variables

    return tf.custom_gradient(call)(*tensors)


def _after(gradient: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, in a graph as something that is computed from a gradient.

    Otherwise the function might be computed again at once, or taken for what was computed
    before. XLA ignores control dependencies.
    """
    if tf.executing_eagerly():
        return [tf.identity(x) for x in tensors]
    first = tf.math.real(tf.reshape(gradient, (-1,))[:1])
    # It is NaN or zero, which nothing but running the graph shows.
    zero = tf.reduce_sum(tf.where(tf.math.is_nan(first), first, tf.zeros_like(first)))
    return [x + tf.cast(zero, x.dtype) if _has_gradient(x) else x for x in tensors]


def _has_gradient(x: Tensor) -> bool:
    return bool(x.dtype.is_floating or x.dtype.is_complex)


@contextlib.contextmanager
def _repeatable(name: str) -> Iterator[None]:
    """Raise an error for random numbers that would be others when they are computed again."""
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    before = len(graph.get_operations())
    yield
    for operation in graph.get_operations()[before:]:
        # Operations whose state is in a kernel have two attributes for the seed.
        if "seed2" in operation.node_def.attr:
            raise ValueError(
                f"Block '{name}' draws random numbers with '{operation.name}', which would be "
                "others when the block is computed again, and its gradients wrong; expected "
                "those of Keras' layers, such as Dropout. Disable gradient checkpointing, or "
                "leave the block out."
            )
