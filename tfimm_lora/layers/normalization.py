"""Normalizations in a mixed batch: each example adds to the outputs what its adapter changed in
the bias (beta) of the layer."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.layers import mixed_batch
from tfimm_lora.layers.mixed_product import shifted
from tfimm_lora.layers.state import original_class

#: Classes of Keras whose last operation adds beta.
_CLASSES = ("BatchNormalization", "GroupNormalization", "LayerNormalization")


def is_normalization(backend: Backend, cls: type) -> bool:
    """Whether a class is a normalization of Keras, with the call of Keras."""
    known = (getattr(backend.keras.layers, name, None) for name in _CLASSES)
    return any(x and issubclass(cls, x) and cls.call is x.call for x in known)  # type: ignore


def bias_refusal(layer: Layer) -> str | None:
    """Why the bias of a frozen layer cannot differ by example, or None."""
    cls = original_class(type(layer))
    if not is_normalization(backend_of(layer), cls):
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


def folded(layer: Layer, call: Any, x: Tensor) -> Tensor | None:
    """Batch normalization of the output of a product in a mixed batch, folded into the product.

    TensorFlow fuses a convolution with the batch normalization that follows. It cannot where
    the convolution is a matrix product for each example, or where a branch is added in between.
    Therefore the factor of the normalization is multiplied into the kernels, or the branch is
    added after it.

    Args:
        layer: The frozen batch normalization.
        call: Its call, in inference mode.
        x: Its input.

    Returns:
        Its output, or None if it cannot be folded or that would gain nothing. In a graph the
        product that x was is then not used, so it is not computed.
    """
    backend = backend_of(layer)
    fold = None if backend.runs_eagerly() else mixed_batch.fold_of(x)
    batch_norm = backend.keras.layers.BatchNormalization
    if fold is None or not isinstance(layer, batch_norm) or bias_refusal(layer) is not None:
        return None
    axis = layer.axis[0] if isinstance(layer.axis, (list, tuple)) else layer.axis
    if axis not in (-1, len(x.shape) - 1) or layer.gamma is None:
        return None
    ops, dtype = backend.ops, x.dtype
    variance = backend.full_precision(layer.moving_variance) + layer.epsilon
    gain = ops.cast(backend.full_precision(layer.gamma) / ops.sqrt(variance), dtype)

    def normalize(y: Tensor) -> Tensor:
        if len(y.shape) == len(x.shape):
            return call(y)
        mean, beta = (backend.full_precision(v) for v in (layer.moving_mean, layer.beta))
        return gain * (y - ops.cast(mean, dtype)) + ops.cast(beta, dtype)

    return fold(gain, normalize)
