"""Large pictures in overlapping tiles: the class of each pixel from the logits of all tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: The share of a side of a tile by which it overlaps the next at least.
OVERLAP = 0.25

Size = tuple[int, int]


def tiled_classes(
    pixels: np.ndarray, size: Size, logits_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The class with the largest mean logit of each pixel, int32 (h, w).

    The picture is cut into tiles that overlap by at least a quarter. Where they do, their
    logits are averaged, with weights that fall linearly to the border of a tile, so that no
    seam is visible. A side that is shorter than that of a tile is continued by its last pixels.

    Args:
        pixels: The picture, (h, w, c).
        size: The height and width of a tile.
        logits_of: Computes the logits (n, height, width, classes) of tiles
            (n, height, width, c).

    Only the logits of one row of tiles are in memory at a time.

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.tiles import tiled_classes
        >>> picture = np.arange(30).reshape(5, 6, 1) % 2
        >>> found = tiled_classes(picture, (4, 4), lambda x: np.concatenate([1 - x, x], -1))
        >>> bool((found == picture[..., 0]).all())
        True
    """
    height, width = pixels.shape[:2]
    missing = [(0, max(0, tile - side)) for tile, side in zip(size, (height, width))]
    padded = np.pad(pixels, (*missing, (0, 0)), mode="edge")
    rows, columns = (_starts(side, tile) for side, tile in zip(padded.shape, size))
    weights = np.outer(_ramp(size[0]), _ramp(size[1]))[..., None].astype(np.float32)
    found = np.zeros(padded.shape[:2], np.int32)
    sums: np.ndarray | None = None
    for top, following in zip(rows, [*rows[1:], padded.shape[0]]):
        band = padded[top : top + size[0]]
        logits = logits_of(np.stack([band[:, x : x + size[1]] for x in columns]))
        if sums is None:
            sums = np.zeros((size[0], padded.shape[1], logits.shape[-1]), np.float32)
            totals = np.zeros((*sums.shape[:2], 1), np.float32)
        for x, one in zip(columns, logits):
            sums[:, x : x + size[1]] += weights * one
            totals[:, x : x + size[1]] += weights
        # The rows above the next tiles are complete.
        done = following - top
        found[top:following] = (sums[:done] / totals[:done]).argmax(-1)
        for array in (sums, totals):
            array[: len(array) - done] = array[done:].copy()
            array[len(array) - done :] = 0
    return found[:height, :width]


def _starts(side: int, tile: int) -> list[int]:
    """Where tiles begin on a side, evenly spaced; the last ends with it.

    Example:
        >>> _starts(10, 4), _starts(4, 4)
        ([0, 3, 6], [0])
    """
    step = max(1, int(tile * (1 - OVERLAP)))
    count = -(-(side - tile) // step) + 1
    return [round(x) for x in np.linspace(0, side - tile, count).tolist()]


def _ramp(length: int) -> np.ndarray:
    """Weights that fall from the middle of a side to its ends."""
    places = np.arange(length)
    weights: np.ndarray = np.minimum(places, length - 1 - places) + 1.0
    return weights
