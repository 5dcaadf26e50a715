"""Turning the adapter of a live model off and on, and making it weaker or stronger."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator
from typing import Any

from tfimm_lora.adapters.module_names import ModuleNames
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.replaced_weights import replaced, shelve, unshelve


@contextlib.contextmanager
def disable_adapter(model: Any) -> Iterator[Any]:
    """Within this block a LoRA model computes as without its adapter.

    Only values change, so compiled functions keep working without a new trace. Blocks may be
    nested; the adapter comes back bit for bit, also after an error. A merged model is merged
    again. Weights that ``load_adapter`` replaced (a classifier, biases) are the model's own in
    the block; weights that were trained in this model itself have no other value and stay.
    ``save_adapter`` in the block saves the adapter; Keras' own weight files are better written
    outside of it.

    Args:
        model: A built LoRA model.

    Yields:
        The model.

    Raises:
        ValueError: if the model has no LoRA layers.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> with lora.disable_adapter(model):
        ...     base = model(np.ones((1, 4), "float32"))
    """
    layers = list(lora_layers(model).values())
    for layer in layers:
        layer._require_built("disable")
    outermost = not layers[0]._lora_state.disabled
    base = replaced(model) if outermost else {}
    weights = [w for w in ModuleNames(model).weights if w.key in base] if base else []
    tuned = {weight.key: weight.value() for weight in weights}
    disabled = []
    try:
        for layer in layers:
            layer.disable()
            disabled.append(layer)
        if outermost:
            shelve(model, tuned)
        for weight in weights:
            weight.variable.assign(base[weight.key].before)
        yield model
    finally:
        for layer in disabled:
            layer.enable()
        for weight in weights:
            weight.assign(tuned[weight.key])
        if outermost:
            unshelve(model)


def set_adapter_scale(model: Any, scale: float) -> Any:
    """Make the adapter of a LoRA model count ``scale`` times: y = x (W + scale * s A B).

    The scale is taken of the adapter as it was trained or loaded: 0.5 and then 1 gives back
    every bit. Only values change, so compiled functions keep working without a new trace.
    With DoRA the magnitude goes the same share of its way: |W| + scale * (m - |W|).
    Saving the adapter saves it as it counts now. Weights that an adapter holds whole are not
    scaled.

    Args:
        model: A built LoRA model, merged or not.
        scale: Any finite number; 0 is the model without its adapter, negative ones turn it
            around.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no LoRA layers, or the scale is not finite.
        TypeError: if the scale is no number.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> lora.set_adapter_scale(model, 0.5) is model
        True
    """
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"Received scale={scale!r}; expected a number.")
    if not math.isfinite(scale):
        raise ValueError(f"Received scale={scale!r}; expected a finite number.")
    layers = lora_layers(model).values()
    for layer in layers:
        layer._require_built("scale")
    for layer in layers:
        layer.set_strength(float(scale))
    return model
