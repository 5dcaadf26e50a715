"""``resized``: resize pictures as ``tf.image.resize`` does, without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.utils.optional_imports import require

#: TensorFlow's names of interpolations -> Pillow's, which have the same kernels.
_RESAMPLING = {
    "nearest": None,  # Pillow rounds it differently
    "area": "BOX",
    "bilinear": "BILINEAR",
    "bicubic": "BICUBIC",
    "lanczos3": "LANCZOS",
}


def resized(pictures: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resize pictures with antialiasing.

    Args:
        pictures: An array (..., h, w, c) of any numeric type.
        size: The height and width of the result.
        method: The interpolation, by TensorFlow's name.

    Returns:
        A float32 array (..., height, width, c), equal to the result of ``tf.image.resize`` with
        ``antialias=True`` up to rounding. Cubic and Lanczos kernels may overshoot.

    Raises:
        ValueError: for an interpolation that needs TensorFlow.
        ImportError: without Pillow.
    """
    if method not in _RESAMPLING:
        raise ValueError(
            f"Received interpolation={method!r} without TensorFlow; expected one of "
            f"{', '.join(_RESAMPLING)}. Other interpolations need TensorFlow: pip install "
            "tensorflow."
        )
    if pictures.shape[-3:-1] == tuple(size):
        return pictures.astype(np.float32)
    resampling = _RESAMPLING[method]
    if resampling is None:
        rows, columns = (_nearest(*sides) for sides in zip(pictures.shape[-3:-1], size))
        return pictures[..., rows[:, None], columns, :].astype(np.float32)
    image_module = require("PIL.Image", extra="cli", why="Resizing pictures")
    planes = np.moveaxis(pictures, -1, -3).astype(np.float32)
    result = np.empty((*planes.shape[:-2], *size), np.float32)
    for index in np.ndindex(*planes.shape[:-2]):
        # In float32, so that nothing is rounded to 8 bits.
        plane: Any = image_module.fromarray(np.ascontiguousarray(planes[index]))
        result[index] = np.asarray(
            plane.resize((size[1], size[0]), image_module.Resampling[resampling])
        )
    return np.moveaxis(result, -3, -1)


def _nearest(before: int, after: int) -> np.ndarray:
    """The index of the nearest pixel for each pixel of a side that is resized."""
    places = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * np.float32(before / after)
    indices: np.ndarray = np.minimum(places.astype(int), before - 1)
    return indices
