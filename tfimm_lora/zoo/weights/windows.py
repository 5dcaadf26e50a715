"""Between a linear layer on a flattened window and the convolution that computes the same.

A linear layer on the flattened output of a Keras model has its inputs in the order (height,
width, channels). A convolution whose window is all of the input has them in torch's order
(channels, height, width). A linear layer is also a 1x1 convolution.
"""

from __future__ import annotations

import numpy as np


def as_window(value: np.ndarray, size: int) -> np.ndarray:
    """Return a weight, or a factor A or B, of a convolution or of a linear layer.

    Args:
        value: In torch's order of axes, (out, in, height, width) or (out, in).
        size: The size of the window of the convolution, or 0 for a linear layer.

    Raises:
        ValueError: If the inputs are not those of such a window.

    Example:
        >>> as_window(np.zeros((3, 4 * 8)), 2).shape, as_window(np.zeros((3, 8, 2, 2)), 0).shape
        ((3, 8, 2, 2), (3, 32))
    """
    if (value.ndim > 2) == bool(size):
        return value
    if not size:
        flat: np.ndarray = value.transpose(0, 2, 3, 1).reshape(len(value), -1)
        return flat
    if value.shape[1] % size**2:
        raise ValueError(
            f"has {value.shape[1]} inputs, which are not those of a {size}x{size} window"
        )
    window: np.ndarray = value.reshape(len(value), size, size, -1).transpose(0, 3, 1, 2)
    return window
