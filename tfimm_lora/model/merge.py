"""Merge the updates of a whole model into its kernels, and unmerge them."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
from tfimm_lora.layers.base import LoRALayer


def lora_layers(model: Layer) -> dict[str, LoRALayer]:
    """Return the LoRA layers of a model by path.

    Raises:
        ValueError: If there are none.
    """
    found = {
        path: layer
        for path, layer in backend_of(model).walk(model)
        if isinstance(layer, LoRALayer)
    }
    if not found:
        raise ValueError(
            f"Received model '{model.name}', which has no LoRA layers. Convert it with "
            "convert_to_lora_model or inject_lora first."
        )
    return found


def has_lora(model: Layer) -> bool:
    """Whether a model has LoRA layers."""
    return any(isinstance(layer, LoRALayer) for _, layer in backend_of(model).walk(model))


def merge_lora_weights(model: Any) -> Any:
    """Add the update s A B to the kernel of every LoRA layer, in place.

    The model then runs at the cost of the ordinary model, and ``unmerge_lora_weights`` can
    restore the kernels exactly. Layers that are already merged are skipped. Saving, copying or
    converting a merged model never applies the update twice. The factors have no effect while
    they are merged: unmerge before you continue training.

    Args:
        model: A built model with LoRA layers.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no LoRA layers, or one is not built.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> lora.merge_lora_weights(model).layers[-1].merged
        True
    """
    layers = lora_layers(model)
    for layer in layers.values():
        layer._require_built("merge")
    for layer in layers.values():
        if not layer.merged:
            layer.merge_weights()
    backend_of(model).reset_functions(model)
    return model


def unmerge_lora_weights(model: Any) -> Any:
    """Undo ``merge_lora_weights`` exactly. Layers that are not merged are skipped.

    Args:
        model: A model with LoRA layers.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no LoRA layers.
    """
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.unmerge_weights()
    backend_of(model).reset_functions(model)
    return model


merge_weights = merge_lora_weights
