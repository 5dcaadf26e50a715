"""What an adapted layer multiplies with its kernel, as rows: one for each place of it.

A layer's output is, place by place, a row x times the kernel as a matrix (m, n); so x A is
the narrow half of its update. For a dense layer x is the last axis of the input, for a
convolution a patch of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conv import ConvUpdate
from tfimm_lora.layers.dense import DenseUpdate
from tfimm_lora.layers.einsum_dense import EinsumDenseUpdate, EinsumProduct

#: How many numbers are worked on at once: 64 MB in float64.
_AT_ONCE = 2**23


class DenseRows:
    """The rows of a dense layer: the last axis of its input."""

    #: The method of the layer that is given the inputs.
    method = "call"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def width(self) -> int:
        """The length of a row."""
        return int(self.layer._kernel_variable.shape[0])

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in an input, a part of them at a time.

        Raises:
            ValueError: for an input that is none of this layer's kernel.
        """
        if x.shape[-1] != self.width:
            raise ValueError(
                f"Layer '{self.layer.name}' has a call of its own, which takes inputs of shape "
                f"{x.shape} for a kernel of {self.width} inputs, so they cannot be told. Leave "
                "the layer out of lora_targets."
            )
        yield from _split(x.reshape(-1, self.width), self.width)

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A, in the layer's shape, of orthonormal columns (width, r)."""
        parts = len(self.layer.lora.qkv or "1")
        return np.tile(vectors, (1, parts))


class EinsumRows:
    """The rows of an einsum dense layer: the axes of its input that the sum runs over."""

    method = "call"

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        product = EinsumProduct(None, layer.equation)
        sizes = dict(zip(product.kernel, layer._kernel_variable.shape))
        self.shape = tuple(int(sizes[c]) for c in product.a[:-1])

    @property
    def width(self) -> int:
        """The length of a row."""
        return math.prod(self.shape)

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in an input, a part of them at a time."""
        product = EinsumProduct(None, self.layer.equation, x.ndim)
        summed = product.a[:-1]
        places = [c for c in product.inputs if c in product.outputs]
        axes = f"{product.inputs}->{''.join(places)}{summed}"
        # What is in neither kernel nor output is summed up before.
        yield from _split(np.einsum(axes, x).reshape(-1, self.width), self.width)

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A, in the layer's shape, of orthonormal columns (width, r)."""
        return vectors.reshape(*self.shape, vectors.shape[1])


class PatchRows:
    """The rows of a convolution: the patches that its window sees, (*window, in) in a row."""

    method = "convolution_op"

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    def width(self) -> int:
        """The length of a row."""
        return math.prod(self.layer._kernel_variable.shape[:-1])

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The patches of an input, those of some examples at a time."""
        layer, axes = self.layer, len(self.layer.kernel_size)
        if layer.data_format == "channels_first":
            x = np.moveaxis(x, 1, -1)
        x = x.reshape(-1, *x.shape[-axes - 1 :])
        if layer.padding == "same":
            x = _padded(x, layer)
        places = math.prod(
            max(0, (size - span) // stride + 1)
            for size, span, stride in zip(x.shape[1:], _spans(layer), layer.strides)
        )
        step = max(1, _AT_ONCE // max(1, places * self.width))
        for i in range(0, len(x), step):
            yield _patches(x[i : i + step], layer).reshape(-1, self.width)

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A, in the layer's shape, of orthonormal columns (width, r)."""
        window = self.layer._kernel_variable.shape[:-1]
        return vectors.reshape(*window, vectors.shape[1])


Rows = DenseRows | EinsumRows | PatchRows


def rows_of(layer: LoRALayer) -> Rows | None:
    """What reads the rows of a layer's inputs, or None where its product has none.

    Those are embeddings, grouped and depthwise convolutions, and einsum dense layers with an
    axis that input, kernel and output share: they have several kernels side by side.
    """
    if isinstance(layer, DenseUpdate):
        return DenseRows(layer)
    if isinstance(layer, EinsumDenseUpdate):
        product = EinsumProduct(None, layer.equation)
        shared = set(product.kernel) & set(product.inputs) & set(product.outputs)
        return None if shared else EinsumRows(layer)
    if isinstance(layer, ConvUpdate) and layer.groups == 1:
        return PatchRows(layer)
    return None


def _split(rows: np.ndarray, width: int) -> Iterator[np.ndarray]:
    step = max(1, _AT_ONCE // width)
    for i in range(0, len(rows), step):
        yield rows[i : i + step]


def _spans(layer: Any) -> list[int]:
    """How far a window reaches in each direction."""
    return [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate)]


def _padded(x: np.ndarray, layer: Any) -> np.ndarray:
    """With the zeros that padding="same" adds: the odd one comes last."""
    around = [(0, 0)]
    for size, span, stride in zip(x.shape[1:], _spans(layer), layer.strides):
        missing = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        around.append((missing // 2, missing - missing // 2))
    return np.pad(x, [*around, (0, 0)])


def _patches(x: np.ndarray, layer: Any) -> np.ndarray:
    """(batch, *places, *window, in) of a padded input (batch, *space, in)."""
    axes = tuple(range(1, x.ndim - 1))
    seen = np.lib.stride_tricks.sliding_window_view(x, _spans(layer), axes)
    # (batch, *places at every step, in, *window with all between).
    places = tuple(slice(None, None, stride) for stride in layer.strides)
    window = tuple(slice(None, None, step) for step in layer.dilation_rate)
    steps = (slice(None), *places, slice(None), *window)
    return np.moveaxis(seen[steps], len(axes) + 1, -1)
