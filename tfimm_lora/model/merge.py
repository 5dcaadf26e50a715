"""Merging the updates of a whole model into its kernels, and back."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer


def lora_layers(model: Any) -> dict[str, LoRALayer]:
    """The LoRA layers of a model by path.

    Raises:
        ValueError: if there are none.
    """
    found = {
        path: layer
        for path, layer in backend_of(model).walk(model)
        if isinstance(layer, LoRALayer)
    }
    if not found:
        raise ValueError(
            f"Received '{model.name}', which has no LoRA layers. Convert it with "
            "convert_to_lora_model or inject_lora first."
        )
    return found


def has_lora(model: Any) -> bool:
    """Whether a model has LoRA layers."""
    return any(isinstance(layer, LoRALayer) for _, layer in backend_of(model).walk(model))


def merge_lora_weights(model: Any) -> Any:
    """Add the update s A B to the kernel of every LoRA layer, in place.

    The model then computes at the cost of the plain one. It keeps what
    ``unmerge_lora_weights`` needs to give every bit back. Layers that are merged already
    stay so. Saving, copying or converting a merged model never applies the update twice.
    The factors have no effect while they are merged: unmerge before going on with training.

    Args:
        model: A built model with LoRA layers.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no LoRA layers, or one is not built.

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
    """Undo ``merge_lora_weights``, bit for bit; layers that are not merged stay so.

    Args:
        model: A model with LoRA layers.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no LoRA layers.
    """
    for layer in lora_layers(model).values():
        if layer.merged:
            layer.unmerge_weights()
    backend_of(model).reset_functions(model)
    return model


merge_weights = merge_lora_weights
