"""Normalizations in a mixed batch: each example adds to the outputs what its adapter changed in
the bias (beta) of the layer."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.layers import mixed_batch
from tfimm_lora.layers.mixed_product import shifted

#: Classes of Keras whose last operation adds beta.
_CLASSES = ("BatchNormalization", "GroupNormalization", "LayerNormalization")


def is_normalization(backend: Backend, cls: type) -> bool:
    """Whether a class is a normalization of Keras, with the call of Keras."""
    known = (getattr(backend.keras.layers, name, None) for name in _CLASSES)
    return any(x and issubclass(cls, x) and cls.call is x.call for x in known)  # type: ignore


def bias_refusal(layer: Layer) -> str | None:
    """Why the bias of a frozen layer cannot differ by example, or None."""
    cls: Any = type(layer)
    if not any(is_normalization(backend_of(layer), base) for base in cls.__mro__[1:]):
        return f"is of the class {cls.__name__}, not a normalization of Keras"
    axis = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if getattr(layer, "beta", None) is None or len(axis) != 1:
        return "is a normalization without beta or with several axes"
    return None


def with_bias_of_example(layer: Layer, outputs: Tensor) -> Tensor:
    """Add the change of the bias of each example to the outputs, within a mixed batch."""
    values = mixed_batch.values_for(layer)
    if values is None or values.shift is None:
        return outputs
    source = mixed_batch.current()
    uniform = source is not None and source.uniform
    backend = backend_of(layer)
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    shape = [1] * len(outputs.shape)
    shape[axis] = int(layer.beta.shape[-1])
    shift = backend.ops.cast(values.shift, outputs.dtype)
    return shifted(backend, outputs, shift, shape, uniform)
