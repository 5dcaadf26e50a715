"""Layers of legacy Keras that are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tf_keras.src.engine import base_layer_utils
from tf_keras.src.mixed_precision import autocast_variable

from tfimm_lora.backend import legacy_random, tensorflow_recompute
from tfimm_lora.backend.interface import Layer, added_loss_error, masked_input_error


def recomputed_call(
    layer: Layer, inside: Sequence[Layer], call: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """``call(*args, **kwargs)`` of a layer with these layers inside; see ``Backend``."""
    flat = tf.nest.flatten([args, kwargs])
    places = [i for i, x in enumerate(flat) if tf.is_tensor(x)]
    if any(getattr(flat[place], "_keras_mask", None) is not None for place in places):
        raise masked_input_error(layer.name)
    context = base_layer_utils.call_context()
    state = context._state
    seed = legacy_random.draw_seed()

    def function(*tensors: Any) -> Any:
        values = list(flat)
        for place, tensor in zip(places, tensors):
            values[place] = tensor
        args, kwargs = tf.nest.pack_sequence_as([args_, kwargs_], values)
        numbers = legacy_random.RepeatableNumbers(seed)
        with (
            # As they are when Keras calls the layer, which it does not in the backward pass.
            base_layer_utils.CallContextManager(context, state),
            autocast_variable.enable_auto_cast_variables(layer._compute_dtype_object),
            legacy_random.drawing_from(numbers, inside),
        ):
            before = _count_losses(inside)
            outputs = call(*args, **kwargs)
            if _count_losses(inside) > before:
                raise added_loss_error(layer.name)
            return outputs

    args_, kwargs_ = args, kwargs
    tensors = [flat[place] for place in places]
    return tensorflow_recompute.recomputed(
        function, tensors, layer.trainable_weights, layer.name
    )


def _count_losses(layers: Sequence[Layer]) -> int:
    """How many losses the calls of layers have added, in a graph or eagerly."""
    return sum(len(layer._losses) + len(layer._eager_losses) for layer in layers)
