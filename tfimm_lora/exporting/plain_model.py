"""The model that is exported: ordinary layers, merged updates, float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend
from tfimm_lora.model.convert import _kernels_merged, convert_to_regular_model
from tfimm_lora.model.copy import build_like, plain_copy
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.zoo.segmentation_classes import without_segmenter

_SIXTEEN_BIT = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


@contextlib.contextmanager
def ordinary_model(model: Any, always_copy: bool) -> Iterator[Any]:
    """The model to export. The argument itself is unchanged after the block.

    Args:
        model: Any built model.
        always_copy: Whether the result must have ordinary classes, as in a Keras file. If not,
            a LoRA model that cannot be copied is merged during the block.

    Raises:
        ValueError: if a copy is needed and the model cannot be copied; within a
            disable_adapter block.
    """
    adapted = has_lora(model)
    for layer in lora_layers(model).values() if adapted else ():
        layer._require_enabled("exported")
        layer._require_built("export")
    is_16_bit = sixteen_bit_type(model) is not None
    if not (adapted or is_16_bit or always_copy):
        yield model
        return
    try:
        copy = convert_to_regular_model(model) if adapted else plain_copy(model)
        copy = in_float32(copy) if is_16_bit else copy
        copy = without_segmenter(copy) if always_copy else copy
    except ValueError:
        if is_16_bit or always_copy:
            raise
    else:
        yield copy
        return
    with _kernels_merged(model):
        yield model


def sixteen_bit_type(model: Any) -> str | None:
    """The 16-bit compute dtype of a layer in the model, or None if there is none."""
    backend = backend_of(model)
    types = {backend.compute_dtype(layer) for _, layer in backend.walk(model)}
    return next((name for name in _SIXTEEN_BIT if name in types), None)


def in_float32(model: Any) -> Any:
    """Copy a model to float32.

    Raises:
        ValueError: if a model that is created from its config does not compute in float32.
    """
    backend = backend_of(model)
    classes = {type(layer).__name__: type(layer) for _, layer in backend.walk(model)}
    with float32_policy(backend), backend.keras.utils.custom_object_scope(classes):
        copy = type(model).from_config(_with_float32(model.get_config()))
        build_like(backend, copy, model)
    values = [np.asarray(value, "float32") for value in model.get_weights()]
    left = sixteen_bit_type(copy)
    if left is not None or [v.shape for v in values] != [tuple(w.shape) for w in copy.weights]:
        raise ValueError(
            f"Model '{model.name}' ({type(model).__name__}) computes in "
            f"{left or sixteen_bit_type(model)} and cannot be recreated from its config in "
            "float32, the dtype of exported files. Create the model under the policy float32 "
            "and set the same weights."
        )
    copy.set_weights(values)
    return copy


@contextlib.contextmanager
def float32_policy(backend: Backend) -> Iterator[None]:
    """Create layers with the dtype policy float32 during the block."""
    policies = backend.keras.mixed_precision
    read = getattr(policies, "global_policy", None) or policies.dtype_policy
    before = read()
    policies.set_global_policy("float32")
    try:
        yield
    finally:
        policies.set_global_policy(before)


def _with_float32(config: Any, key: str = "") -> Any:
    """Replace the 16-bit dtypes and policies in a config by float32."""
    if isinstance(config, dict):
        return {k: _with_float32(value, k) for k, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_with_float32(value, key) for value in config)
    is_type = key in ("dtype", "name") and isinstance(config, str)
    return "float32" if is_type and config in _SIXTEEN_BIT else config
