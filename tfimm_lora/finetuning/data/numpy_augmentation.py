"""``Augmentation`` with numpy and Pillow, for Keras on JAX or torch without TensorFlow.

The random numbers are those of TensorFlow and the computations are the same, in float32, so the
results are equal up to rounding. If that of a crop is at a half, it may differ by a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tfimm_lora.finetuning.data.random_numbers import uniform
from tfimm_lora.zoo.weights.resizing import resized

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.augmentation import Augmentation

#: The random numbers of a picture, in [0, 1). Append new ones: the others must not change.
DRAWN = (
    "area",
    "ratio",
    "top",
    "left",
    "flip",
    "turn",
    "brightness",
    "contrast",
    "saturation",
)

#: The weights of red, green and blue in grey (ITU-R 601).
GREY = (0.299, 0.587, 0.114)


def numpy_augmentation(
    augmentation: Augmentation, size: tuple[int, int], method: str, crop_pct: float
) -> Callable[..., Any]:
    """Return the function that ``Augmentation.function`` describes, for numpy arrays."""

    def augment(picture: Any, seed: Any, mask: Any = None) -> Any:
        picture = np.asarray(picture)
        drawn = dict(zip(DRAWN, uniform((int(seed[0]), int(seed[1])), len(DRAWN))))
        top, left, rows, columns = _crop(augmentation, picture, size, crop_pct, drawn)

        def moved(image: np.ndarray, method: str, is_mask: bool = False) -> np.ndarray:
            image = resized(image[top : top + rows, left : left + columns], size, method)
            if not is_mask:
                image = image.clip(0, 255)
            if augmentation.flip and drawn["flip"] < 0.5:
                image = image[:, ::-1]
            if augmentation.rotate:
                limit = np.float32(math.radians(augmentation.rotate))
                angle = limit * (2 * drawn["turn"] - 1)
                image = _turned(image, angle, nearest=is_mask)
            return image

        picture = _coloured(augmentation, moved(picture, method), drawn)
        if mask is None:
            return picture
        moved_mask = moved(np.asarray(mask)[..., None], "nearest", True)[..., 0]
        return picture, moved_mask.astype(np.int32)

    return augment


def _crop(
    augmentation: Augmentation, picture: np.ndarray, size: Any, crop_pct: float, drawn: Any
) -> tuple[int, int, int, int]:
    """Top, left, height and width of the crop."""
    one = np.float32
    sides = np.array(picture.shape[:2], np.float32)
    height, width = sides
    proportion = size[1] / size[0]
    low, high = augmentation.ratio if augmentation.scale is not None else (1.0, 1.0)
    low, high = one(low * proportion), one(high * proportion)
    largest = min(height * width, min(height**2 * high, width**2 / low))
    if augmentation.scale is None:
        area, ratio = largest * one(crop_pct**2), one(proportion)
        places = np.array([0.5, 0.5], np.float32)
    else:
        least, most = augmentation.scale
        area = height * width * (one(least) + one(most - least) * drawn["area"])
        area = min(area, largest)
        first = np.log(max(low, area / height**2))
        last = np.log(min(high, width**2 / area))
        ratio = np.exp(first + (last - first) * drawn["ratio"])
        places = np.stack([drawn["top"], drawn["left"]])
    crop = np.rint(np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)]))
    crop = np.clip(crop, 1, sides)
    corner = np.minimum(np.floor(places * (sides - crop + 1)), sides - crop)
    return int(corner[0]), int(corner[1]), int(crop[0]), int(crop[1])


def _coloured(augmentation: Augmentation, picture: np.ndarray, drawn: Any) -> np.ndarray:
    names = ("brightness", "contrast", "saturation")
    if not any(getattr(augmentation, name) for name in names):
        return np.ascontiguousarray(picture)
    channels = picture.shape[-1]
    weights = GREY if channels == 3 else (1 / channels,) * channels
    grey = np.array(weights, np.float32)[:, None]
    b, c, s = (1 + np.float32(getattr(augmentation, n)) * (2 * drawn[n] - 1) for n in names)
    mean = picture.mean((0, 1), dtype=np.float32)[None] @ grey
    matrix = c * b * (s * np.eye(channels, dtype=np.float32) + (1 - s) * grey)
    coloured: np.ndarray = np.clip(picture @ matrix + (1 - c) * b * mean, 0, 255)
    return coloured


def _turned(picture: np.ndarray, angle: Any, nearest: bool = False) -> np.ndarray:
    """Rotate a picture (h, w, c) about its center; corners are filled by reflection."""
    height, width = picture.shape[:2]
    cos, sin = np.cos(angle), np.sin(angle)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    middle_y, middle_x = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
    dy, dx = y - middle_y, x - middle_x
    rows = _reflected(middle_y + sin * dx + cos * dy, height)
    columns = _reflected(middle_x + cos * dx - sin * dy, width)
    if nearest:
        places = np.floor(rows + 0.5).astype(int), np.floor(columns + 0.5).astype(int)
        closest: np.ndarray = picture[places]
        return closest
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, across = (rows - top)[..., None], (columns - left)[..., None]
    upper = picture[top, left] * (1 - across) + picture[top, right] * across
    lower = picture[bottom, left] * (1 - across) + picture[bottom, right] * across
    turned: np.ndarray = (upper * (1 - down) + lower * down).astype(np.float32)
    return turned


def _reflected(places: np.ndarray, length: int) -> np.ndarray:
    """Reflect coordinates at the borders of pixels: d c b a | a b c d | d c b a."""
    places = (places + 0.5) % (2 * length)
    places = np.where(places >= length, 2 * length - places, places) - 0.5
    return places.clip(0, length - 1)
