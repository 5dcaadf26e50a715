"""``read_mask`` reads a mask as classes; ``mask_content`` counts what is in one.

A mask is a picture file, or a picture in a file of COCO: ``coco_reference``.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping

import numpy as np

from tfimm_lora.finetuning.data.coco_file import coco_mask, split_reference
from tfimm_lora.finetuning.data.mask_classes import MaskClasses
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, open_pixels

#: The modes of Pillow whose pixels are one number.
_INDEXED = ("1", "P", "L", "I", "I;16", "I;16L", "I;16B")


class MaskContent:
    """What is in a mask.

    Attributes:
        size: Its height and width.
        counts: The number of pixels of each value, an index or a colour 0xrrggbb.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.size: tuple[int, int] = (pixels.shape[0], pixels.shape[1])
        values, counts = np.unique(pixels, return_counts=True)
        self.counts: Mapping[int, int] = dict(zip(values.tolist(), counts.tolist()))


def read_mask(path: str, classes: MaskClasses) -> np.ndarray:
    """Read a mask as the index of the class of each pixel, int32 (h, w); -1 is ignored.

    Raises:
        UnreadablePicture: if it is no mask of these classes.
        ImportError: without Pillow.
    """
    try:
        return classes.indices(_pixels(path, classes.of_colours))
    except UnreadablePicture:
        raise
    except ValueError as error:
        raise UnreadablePicture(path, str(error)) from error


def mask_content(path: str, of_colours: bool) -> MaskContent:
    """What is in a mask. A file that has not changed is read once.

    Raises:
        UnreadablePicture: if it cannot be read, or has colours instead of indices.
    """
    try:
        state = os.stat(mask_file(path))
    except OSError as error:
        raise UnreadablePicture(path, str(error)) from error
    return _content(path, of_colours, state.st_mtime_ns, state.st_size)


def mask_file(path: str) -> str:
    """The file in which a mask is."""
    reference = split_reference(path)
    return path if reference is None else reference[0]


def mask_identity(path: str) -> bytes:
    """What two masks have in common if they are the same."""
    if split_reference(path) is None:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    return hashlib.sha256(_pixels(path, False).tobytes()).digest()


@functools.cache
def _content(path: str, of_colours: bool, time: int, size: int) -> MaskContent:
    return MaskContent(_pixels(path, of_colours))


def _pixels(path: str, of_colours: bool) -> np.ndarray:
    """The indices of a mask, or its colours as 0xrrggbb: integers (h, w)."""
    reference = split_reference(path)
    if reference is not None:
        return coco_mask(*reference)
    with open_pixels(path) as image:
        if of_colours:
            rgb = np.asarray(image.convert("RGB")).astype(np.int32)
            colours: np.ndarray = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
            return colours
        if image.mode == "LA":
            image = image.getchannel(0)
        if image.mode not in _INDEXED:
            raise UnreadablePicture(
                path,
                f"it has colours (mode {image.mode}); expected a mask with the index of the "
                f"class in each pixel ({', '.join(_INDEXED[1:5])}), or a table of the colours: "
                "--classes (classes=).",
            )
        return np.asarray(image).astype(np.int32)
