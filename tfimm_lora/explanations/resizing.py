"""Heat maps of a grid in the size of a picture."""

from __future__ import annotations

import numpy as np


def enlarged(maps: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Maps (n, rows, columns) in another size, with linear interpolation.

    The value of a place is that of its centre; beyond the outermost centres it is constant.

    Example:
        >>> enlarged(np.array([[[0.0, 1.0]]]), (1, 4)).tolist()
        [[[0.0, 0.25, 0.75, 1.0]]]
    """
    rows, columns = (_interpolation(n, side) for n, side in zip(maps.shape[1:], sides))
    result: np.ndarray = rows @ maps @ columns.T
    return result


def _interpolation(count: int, side: int) -> np.ndarray:
    """The matrix (side, count) of the linear interpolation of one axis."""
    centres = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
    weights: np.ndarray = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(count)))
    return weights
