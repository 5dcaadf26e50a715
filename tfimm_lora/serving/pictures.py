"""Uploaded pictures to inputs of the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tfimm_lora.finetuning.data.pictures import UnreadablePicture, decode_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.serving.errors import RequestError

#: The formats of uploads, as Pillow calls them. Of an animation the first frame is read.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def picture_reader(
    preprocessing: Preprocessing, most_pixels: int
) -> Callable[[bytes], np.ndarray]:
    """A function from the bytes of an uploaded file to an input (height, width, channels).

    Pictures are decoded, resized, cropped and normalized as in ``tfimm-lora predict``.

    Args:
        preprocessing: The preprocessing of the base model.
        most_pixels: The most pixels of a picture, before and after resizing.

    Returns:
        The function. It raises ``RequestError`` for a picture that cannot be used.
    """
    prepare = preprocessing.function(resize=True)
    channels = preprocessing.in_channels

    def read(content: bytes) -> np.ndarray:
        try:
            pixels = decode_picture(content, channels, formats=FORMATS, most_pixels=most_pixels)
        except UnreadablePicture as problem:
            raise RequestError(
                422,
                f"a file of {len(content)} bytes that cannot be read: "
                f"{problem.reason.rstrip('.')}",
                f"a picture in {', '.join(FORMATS)} with at most {most_pixels} pixels",
            ) from problem
        height, width, _ = pixels.shape
        resized = _resized_pixels(height, width, preprocessing)
        if resized > most_pixels:
            raise RequestError(
                422,
                f"a picture of {width} x {height} pixels, which would have {resized} after its "
                f"shorter side is resized to that of the model",
                f"a picture with at most {most_pixels} then: crop it",
            )
        return np.asarray(prepare(pixels), np.float32)

    return read


def _resized_pixels(height: int, width: int, preprocessing: Preprocessing) -> int:
    """About how many pixels a picture has once it covers the input, before it is cropped.

    A strip of few pixels with an extreme ratio of its sides would have billions.
    """
    sides = [side / preprocessing.crop_pct for side in preprocessing.input_size]
    factor = max(sides[0] / height, sides[1] / width)
    return int(height * factor * width * factor)
