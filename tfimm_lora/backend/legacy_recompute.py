"""Layers of legacy Keras that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tf_keras.src.engine import base_layer_utils
from tf_keras.src.mixed_precision import autocast_variable

from tfimm_lora.backend import legacy_random, recompute, tensorflow_recompute
from tfimm_lora.backend.interface import Layer, Tensor, Variable


def recomputed_call(
    layer: Layer,
    inside: Sequence[Layer],
    trained: Sequence[Variable],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """``call(*args, **kwargs)`` of a layer with these layers inside; see ``Backend``."""
    given = recompute.Leaves(tf.nest, [args, kwargs], tf.is_tensor)
    if any(getattr(x, "_keras_mask", None) is not None for x in given.tensors):
        raise recompute.masked_input(layer.name)
    context = base_layer_utils.call_context()
    state = context._state
    seed = legacy_random.draw_seed()
    first: list[recompute.Leaves] = []

    def function(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = given.with_tensors(tensors)
        numbers = legacy_random.RepeatableNumbers(seed)
        with (
            # As they are when Keras calls the layer, which it does not in the backward pass.
            base_layer_utils.CallContextManager(context, state),
            autocast_variable.enable_auto_cast_variables(layer._compute_dtype_object),
            legacy_random.drawing_from(numbers, inside),
        ):
            before = _count_losses(inside)
            outputs = recompute.Leaves(tf.nest, call(*args, **kwargs), tf.is_tensor)
            if _count_losses(inside) > before:
                raise recompute.added_loss(layer.name)
        if not first:
            first.append(outputs)
        return outputs.tensors

    tensors = tensorflow_recompute.recomputed(
        layer, function, given.tensors, trained, context.training is True
    )
    return first[0].with_tensors(tensors)


def _count_losses(layers: Sequence[Layer]) -> int:
    """How many losses the calls of layers have added, in a graph or eagerly."""
    return sum(len(layer._losses) + len(layer._eager_losses) for layer in layers)
