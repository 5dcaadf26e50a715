"""``disable_adapter`` and ``set_adapter_scale``: the strength of a live model's adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import model_state
from tfimm_lora.validation import check_number
from tfimm_lora.zoo.weights.module_names import ModuleNames


@contextlib.contextmanager
def disable_adapter(model: Any) -> Iterator[Any]:
    """Disable the adapter of a LoRA model within a ``with`` block.

    Only values change, so compiled functions keep working without a new trace. Blocks may be
    nested. At the end, also after an error, the adapter is restored exactly, and a merged model
    is merged again.

    Within the block, weights that ``load_adapter`` replaced (a classifier, biases) have the
    model's original values. Weights that were trained in this model have no other value and
    stay. ``save_adapter`` saves the disabled adapter. Write Keras weight files outside of the
    block.

    Args:
        model: A built LoRA model.

    Yields:
        The model.

    Raises:
        ValueError: If the model has no LoRA layers or is not built.

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
    is_outermost = not layers[0]._lora_state.disabled
    state = model_state(model)
    originals = dict(state.replaced) if is_outermost else {}
    weights = [w for w in ModuleNames(model).weights if w.key in originals] if originals else []
    tuned = {weight.key: weight.value() for weight in weights}
    disabled = []
    try:
        for layer in layers:
            layer.disable()
            disabled.append(layer)
        if is_outermost:
            state.while_disabled = tuned
        for weight in weights:
            weight.variable.assign(originals[weight.key].before)
        yield model
    finally:
        # Before the layers, which are merged again with the biases that they have then.
        for weight in weights:
            weight.assign(tuned[weight.key])
        for layer in disabled:
            layer.enable()
        if is_outermost:
            state.while_disabled = {}


def set_adapter_scale(model: Any, scale: float) -> Any:
    """Multiply the update of a LoRA model by ``scale``: y = x (W + scale * s A B).

    The factor is relative to the adapter as trained or loaded: 0.5 followed by 1 restores it
    exactly. Only values change, so compiled functions keep working without a new trace. With
    DoRA the magnitude m becomes |W| + scale * (m - |W|).

    Saving the adapter saves the scaled values. Fully trained weights are not scaled.

    Args:
        model: A built LoRA model, merged or not.
        scale: Any finite number. 0 is the model without its adapter, and a negative number
            subtracts the update.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no LoRA layers or is not built, or the scale is not
            finite.
        TypeError: If the scale is not a number.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> lora.set_adapter_scale(model, 0.5) is model
        True
    """
    check_number(scale, "scale")
    layers = lora_layers(model).values()
    for layer in layers:
        layer._require_built("scale")
    for layer in layers:
        layer.set_strength(float(scale))
    return model
