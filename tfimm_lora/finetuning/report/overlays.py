"""Masks over pictures: the classes of pixels as transparent colours."""

from __future__ import annotations

import numpy as np

from tfimm_lora.finetuning.data.mask_classes import IGNORED
from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.zoo.weights.resizing import resized

#: The share of the colour of the class in a pixel.
OPACITY = 0.55

#: The colour of pixels that are ignored.
_GREY = (128, 128, 128)


def overlay(pixels: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Draw the classes of pixels over a picture.

    Args:
        pixels: The picture, uint8 (h, w, 3).
        classes: The class of each pixel, (h, w); -1 for those that are ignored.
        palette: The colour of each class, uint8 (classes, 3).

    Returns:
        The picture with the colours, uint8 (h, w, 3).

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.data.mask_classes import default_palette
        >>> from tfimm_lora.finetuning.report.overlays import overlay
        >>> white = np.full((1, 2, 3), 255, "uint8")
        >>> overlay(white, np.array([[0, 1]]), default_palette(2)).tolist()
        [[[115, 115, 115], [185, 115, 115]]]
    """
    colours = np.concatenate([palette, [_GREY]])[np.where(classes == IGNORED, -1, classes)]
    mixed: np.ndarray = np.rint((1 - OPACITY) * pixels + OPACITY * colours).astype(np.uint8)
    return mixed


def side_by_side(
    path: str, masks: tuple[np.ndarray, ...], palette: np.ndarray, side: int = 192
) -> np.ndarray:
    """A picture file, and beside it the picture with each of some masks.

    Args:
        path: The file.
        masks: The class of each pixel, of the whole picture in any size.
        palette: The colours.
        side: The length of the longer side of each picture in the result.

    Raises:
        UnreadablePicture: if the file cannot be read.
    """
    pixels = read_picture(path, at_least=side)
    factor = side / max(pixels.shape[:2])
    size = tuple(max(1, round(factor * length)) for length in pixels.shape[:2])
    small = resized(pixels, (size[0], size[1]), "area").clip(0, 255).astype(np.uint8)
    gap = np.full((size[0], 4, 3), 255, np.uint8)
    parts = [small]
    for mask in masks:
        classes = resized(mask[..., None], (size[0], size[1]), "nearest")[..., 0].astype(int)
        parts += [gap, overlay(small, classes, palette)]
    return np.concatenate(parts, axis=1)
