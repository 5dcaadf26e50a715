"""What a layer multiplies with its kernel, as rows of numbers.

A layer's output is, place by place, a row x times the kernel as a matrix (m, n), so x A is
the narrow product of its update. For a dense layer x is the last axis of the input, for a
convolution a patch of it. EVA collects these rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from tfimm_lora.backend.interface import Layer

#: How many numbers are processed at once: 64 MB in float64.
_AT_ONCE = 2**23


class InputRows(Protocol):
    """The input rows of one layer."""

    #: The method of the layer that is given the inputs.
    method: str
    #: The length of a row.
    width: int

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in an input, a part of them at a time.

        Raises:
            ValueError: if the input does not fit the kernel.
        """

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A, in the layer's shape, from orthonormal columns (width, r)."""


class PatchRows:
    """The input rows of a convolution: the patches of its window, (*window, in) as a row."""

    method = "convolution_op"

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._window = tuple(layer._kernel_variable.shape[:-1])
        self.width = math.prod(self._window)

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
        """A from orthonormal columns (width, r)."""
        return vectors.reshape(*self._window, vectors.shape[1])


def split_rows(rows: np.ndarray) -> Iterator[np.ndarray]:
    """A matrix of rows, a part of them at a time."""
    step = max(1, _AT_ONCE // rows.shape[1])
    for i in range(0, len(rows), step):
        yield rows[i : i + step]


def _spans(layer: Layer) -> list[int]:
    """The extent of the window in each direction."""
    return [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate)]


def _padded(x: np.ndarray, layer: Layer) -> np.ndarray:
    """With the zeros that padding="same" adds; an odd one comes last."""
    around = [(0, 0)]
    for size, span, stride in zip(x.shape[1:], _spans(layer), layer.strides):
        missing = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        around.append((missing // 2, missing - missing // 2))
    return np.pad(x, [*around, (0, 0)])


def _patches(x: np.ndarray, layer: Layer) -> np.ndarray:
    """(batch, *places, *window, in) of a padded input (batch, *space, in)."""
    axes = tuple(range(1, x.ndim - 1))
    seen = np.lib.stride_tricks.sliding_window_view(x, _spans(layer), axes)
    # (batch, *places at every step, in, *window with all positions between).
    places = tuple(slice(None, None, stride) for stride in layer.strides)
    window = tuple(slice(None, None, step) for step in layer.dilation_rate)
    steps = (slice(None), *places, slice(None), *window)
    return np.moveaxis(seen[steps], len(axes) + 1, -1)
