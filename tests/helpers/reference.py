"""What LoRA layers compute, written once more in plain NumPy (float64), for comparison.

Nothing here shares code with the package: convolutions are loops over output positions,
updates are sums written out as in the papers.
"""

import numpy as np


def dense_update(a, b):
    return np.einsum("ir,ro->io", a, b)


def parts_update(a, b, chosen, parts):
    """Each chosen part's own A B in its columns, zero in the others."""
    rank, width = a.shape[1] // len(chosen), b.shape[1]
    update = np.zeros((a.shape[0], parts * width))
    for place, part in enumerate(chosen):
        own = slice(place * rank, (place + 1) * rank)
        update[:, part * width : (part + 1) * width] = a[:, own] @ b[own]
    return update


def conv_update(a, b):
    return np.einsum("...ir,ro->...io", a, b)


def depthwise_update(a, b, kernel_shape):
    height, width, channels, multiplier = kernel_shape
    update = np.zeros(kernel_shape)
    for position in range(height * width):
        for column in range(channels * multiplier):
            value = sum(a[position, r] * b[r, column] for r in range(a.shape[1]))
            row, col = divmod(position, width)
            update[row, col, column // multiplier, column % multiplier] = value
    return update


def dense(x, kernel):
    return np.tensordot(x, kernel, axes=([-1], [0]))


def _same_padding(size, kernel, stride, dilation):
    reach = (kernel - 1) * dilation + 1
    out = -(-size // stride)
    total = max((out - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2


def convolution(x, kernel, strides, padding, dilation, groups=1):
    """A convolution over any number of axes, channels last, by its definition."""
    spatial = kernel.ndim - 2
    window = kernel.shape[:spatial]
    if padding == "same":
        pads = [
            _same_padding(x.shape[1 + i], window[i], strides[i], dilation[i])
            for i in range(spatial)
        ]
    elif padding == "causal":
        pads = [((window[0] - 1) * dilation[0], 0)]
    elif padding == "valid":
        pads = [(0, 0)] * spatial
    else:
        pads = [(p, p) for p in padding]
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    sizes = [
        (x.shape[1 + i] - (window[i] - 1) * dilation[i] - 1) // strides[i] + 1
        for i in range(spatial)
    ]
    filters, per_group = kernel.shape[-1], kernel.shape[-2]
    y = np.zeros((x.shape[0], *sizes, filters))
    for place in np.ndindex(*sizes):
        for offset in np.ndindex(*window):
            at = tuple(place[i] * strides[i] + offset[i] * dilation[i] for i in range(spatial))
            for group in range(groups):
                ins = slice(group * per_group, (group + 1) * per_group)
                outs = slice(group * filters // groups, (group + 1) * filters // groups)
                pixel = x[(slice(None), *at, ins)]
                y[(slice(None), *place, outs)] += pixel @ kernel[(*offset, slice(None), outs)]
    return y


def depthwise(x, kernel, strides, padding, dilation):
    channels, multiplier = kernel.shape[-2:]
    outs = [
        convolution(x[..., c : c + 1], kernel[:, :, c : c + 1, :], strides, padding, dilation)
        for c in range(channels)
    ]
    assert outs[0].shape[-1] == multiplier
    return np.concatenate(outs, axis=-1)
