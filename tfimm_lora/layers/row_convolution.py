"""Convolutions with a kernel for each example.

No framework has a fast routine for them on the CPU. They are computed as a sum over the window:
at each of its positions the inputs that lie there, x[t], are multiplied with the kernels there:

    y_i = sum over t of x_i[t] K_i[t]

The kernels are factors, so the products are narrow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.layers.mixed_product import by_example, sizes


def apply_rows(layer: Layer, x: Tensor, kernels: Tensor) -> Tensor:
    """x_i K_i for a convolution without groups.

    Args:
        layer: The convolution.
        x: (examples * m, *space, in), or with channels first.
        kernels: (examples, *window, in, out).

    Returns:
        (examples * m, *places, out), or with channels first.
    """
    y, places = _over_window(layer, x, kernels)
    return _as_outputs(layer, y, places, kernels.shape[-1])


def branch_rows(layer: Layer, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(x_i A_i) B_i for a convolution, with or without groups.

    Args:
        layer: The convolution.
        x: (examples * m, *space, in), or with channels first.
        a: (examples, *window, in / groups, rank).
        b: (examples, rank, out).

    Returns:
        (examples * m, *places, out), or with channels first.
    """
    backend, groups = backend_of(layer), layer.groups
    ops, rank, units = backend.ops, a.shape[-1], b.shape[-1]
    h, places = _over_window(layer, x, a)
    if groups == 1:
        y = ops.matmul(h, b)
    else:
        h = ops.reshape(h, (sizes(backend, a)[0], -1, groups, rank))
        split = ops.reshape(b, (-1, rank, groups, units // groups))
        y = ops.einsum("npgr,nrgo->npgo", h, split)
    return _as_outputs(layer, y, places, units)


def depthwise_rows(layer: Layer, x: Tensor, kernels: Tensor) -> Tensor:
    """A depthwise convolution with a kernel for each example.

    It is one depthwise convolution of a single example with the channels of all.

    Args:
        layer: The depthwise convolution.
        x: (examples, *space, channels), or with channels first.
        kernels: (examples, *window, channels, multiplier).
    """
    backend = backend_of(layer)
    ops = backend.ops
    count, *space, channels = sizes(backend, x)
    first = layer.data_format == "channels_first"
    if first:
        count, channels, *space = sizes(backend, x)
    *window, _, multiplier = kernels.shape[1:]
    kernel = ops.reshape(
        ops.transpose(kernels, (1, 2, 0, 3, 4)), (*window, count * channels, multiplier)
    )
    wide = (
        ops.reshape(x, (1, count * channels, *space))
        if first
        else ops.reshape(ops.transpose(x, (1, 2, 0, 3)), (1, *space, count * channels))
    )
    y = backend.depthwise_convolution(layer, wide, kernel)
    units = channels * multiplier
    if first:
        return ops.reshape(y, (count, units, *sizes(backend, y)[2:]))
    y = ops.reshape(y, (*sizes(backend, y)[1:-1], count, units))
    return ops.transpose(y, (2, 0, 1, 3))


def _over_window(layer: Layer, x: Tensor, kernels: Tensor) -> tuple[Tensor, list[Any]]:
    """The sum over the window, (examples, rows, out), and the sizes of the output.

    There is a row for each place and each group: the groups share a kernel.
    """
    backend = backend_of(layer)
    ops = backend.ops
    if layer.data_format == "channels_first":
        x = ops.moveaxis(x, 1, -1)
    total, places = None, []
    for position, inputs in _at_window(layer, x):
        places = sizes(backend, inputs)[1:-1]
        rows = by_example(backend, inputs, kernels)
        rows = ops.reshape(rows, (sizes(backend, rows)[0], -1, kernels.shape[-2]))
        part = ops.matmul(rows, _at(kernels, *position))
        total = part if total is None else total + part
    return total, places


def _as_outputs(layer: Layer, y: Tensor, places: list[Any], units: int) -> Tensor:
    ops = backend_of(layer).ops
    y = ops.reshape(y, (-1, *places, units))
    return ops.moveaxis(y, -1, 1) if layer.data_format == "channels_first" else y


def _at_window(layer: Layer, x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield each position in the window of a layer with the inputs that lie there."""
    backend, steps = backend_of(layer), layer.strides
    space = sizes(backend, x)[1:-1]
    spans = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation_rate)]
    around = [
        _padding(backend, layer.padding, size, span, step)
        for size, span, step in zip(space, spans, steps)
    ]
    if any(not isinstance(side, int) or side for sides in around for side in sides):
        x = backend.ops.pad(x, [[0, 0], *around, [0, 0]])
    counts = [
        (size + before + after - span) // step + 1
        for size, (before, after), span, step in zip(space, around, spans, steps)
    ]
    for position in itertools.product(*map(range, layer.kernel_size)):
        at = [
            slice(p * d, p * d + (count - 1) * step + 1, step)
            for p, d, count, step in zip(position, layer.dilation_rate, counts, steps)
        ]
        yield position, _at(x, *at)


def _at(x: Tensor, *index: Any) -> Tensor:
    """x[:, *index]."""
    return x[(slice(None),) + index]


def _padding(backend: Backend, padding: str, size: Any, span: int, step: int) -> list[Any]:
    """The zeros before and after an axis that the convolution adds. For "causal" the call of
    the layer has added them to its inputs."""
    if padding in ("valid", "causal"):
        return [0, 0]
    missing = (-(-size // step) - 1) * step + span - size
    if isinstance(size, int):
        missing = max(missing, 0)
    else:  # a tensor: the size is not known
        missing = backend.ops.where(missing > 0, missing, 0)
    return [missing // 2, missing - missing // 2]
