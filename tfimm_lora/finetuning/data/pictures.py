"""Files to arrays: any picture as uint8 (height, width, channels), and a check of all of them.

Pillow reads the files, here and nowhere else: what has passed the check is what training,
evaluation and prediction see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, Split
from tfimm_lora.finetuning.data.folders import some
from tfimm_lora.utils.optional_imports import require

#: What Pillow may take a file for, whatever its name: not formats that start other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

_ORIENTATION = 0x0112  # of EXIF
_BITS_PER_SAMPLE = 258  # of TIFF

#: Pictures handed to the threads at once: enough to keep them busy, and soon stopped.
_AT_ONCE = 256

Pictures = TypeVar("Pictures", Split, PictureSet)


class UnreadablePicture(ValueError):
    """A file that is no picture, or a damaged one; ``path`` and ``reason`` say more."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Cannot read the picture {path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Problem:
    """A picture that cannot be used, and why."""

    path: str
    label: str
    reason: str


def read_picture(
    path: str | os.PathLike[str], channels: int = 3, *, at_least: int | None = None
) -> np.ndarray:
    """Read a file as an upright picture in the usual form.

    Palettes, grey pictures and CMYK become RGB; transparent parts become white; 16 bits are
    scaled to 8; the orientation in the EXIF data is applied; of an animation the first frame
    is taken. Colour profiles are not applied, as in timm.

    Args:
        path: A jpeg, png, bmp, gif, webp, tiff, ppm or pgm file, whatever its name.
        channels: 3 for RGB, 1 for grey.
        at_least: Neither side needs more pixels than this. A large jpeg is then read at a half,
            a quarter or an eighth of its size, which is several times as fast. Default: read
            in full.

    Returns:
        An array of uint8, (height, width, channels).

    Raises:
        ValueError: for other numbers of channels.
        UnreadablePicture: (a ValueError) if the file is missing, damaged, cut off, not a
            picture, so large that Pillow takes it for an attack, or of 32 bits, whose range
            nothing tells.
        ImportError: without Pillow.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from tfimm_lora.finetuning.data.pictures import read_picture
        >>> file = tempfile.NamedTemporaryFile(suffix=".png")
        >>> Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(file.name)  # all transparent
        >>> array = read_picture(file.name)
        >>> array.shape, int(array.min())
        ((2, 4, 3), 255)
    """
    image_module = require("PIL.Image", extra="cli", why="Reading pictures")
    if channels not in (1, 3):
        raise ValueError(f"Received channels={channels}; expected 3 (RGB) or 1 (grey).")
    try:
        with image_module.open(path, formats=_FORMATS) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            rgb = _upright(image, _rgb(image, image_module), image_module)
            array = np.array(rgb if channels == 3 else rgb.convert("L"))
            return array.reshape(*array.shape[:2], channels)
    except image_module.UnidentifiedImageError:
        reason = f"damaged, or none of {', '.join(_FORMATS)}."
        raise UnreadablePicture(os.fspath(path), reason) from None
    except Exception as error:  # damaged files make decoders raise anything
        raise UnreadablePicture(os.fspath(path), str(error) or type(error).__name__) from error


def _rgb(image: Any, image_module: Any) -> Any:
    """A loaded picture of any mode as RGB, on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, image_module)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = image_module.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _eight_bits(image: Any, image_module: Any) -> Any:
    """A grey picture of 16 bits as one of 8."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            "it has 32 bits or signs, and nothing says which values are black and white. "
            "Save it with 8 or 16 bits."
        )
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]  # 12 from some microscopes
    values = np.asarray(image).astype(np.float64)
    transparent = values == image.info.get("transparency", -1)
    values = np.where(transparent, 255, np.rint(values * (255 / (2**bits - 1))))
    return image_module.fromarray(values.astype(np.uint8))


def _upright(image: Any, pixels: Any, image_module: Any) -> Any:
    """The pixels turned as the EXIF data of their file say."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF data say nothing, the picture is whole
        return pixels
    turn = image_module.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return pixels.transpose(turns[orientation]) if orientation in turns else pixels


def check_pictures(
    pictures: Pictures,
    on_error: str = "skip",
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pictures, list[Problem]]:
    """Read every picture once, before training, and take out those that cannot be used.

    That are pictures that ``read_picture`` cannot read, and those with a side of one pixel.
    The check costs about as much as reading the pictures of one epoch: some 2 ms for a jpeg of
    512 x 512 pixels, 0.1 s for one of 12 million, divided by the number of cores.

    Args:
        pictures: A ``Split`` or a ``PictureSet``.
        on_error: "skip" to leave bad pictures out, "refuse" to raise an error if there are any.
        workers: Number of threads. Default: the number of cores. Pillow decodes in parallel.
        progress: Called as ``progress(done, total)`` after each picture.

    Returns:
        The same kind as given without the bad pictures, and a list of ``Problem``.

    Raises:
        ValueError: for "refuse", after all were read, with the first of them and their number;
            if a class has no pictures to train on any more; if nothing is left of a part.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from tfimm_lora.finetuning.data.dataset import Picture, PictureSet
        >>> from tfimm_lora.finetuning.data.pictures import check_pictures
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("L", (8, 8)).save(folder / "good.png")
        >>> _ = (folder / "bad.png").write_bytes(b"")
        >>> found = [Picture(str(folder / name), 0) for name in ("good.png", "bad.png")]
        >>> clean, problems = check_pictures(PictureSet(tuple(found), ("cat",)))
        >>> len(clean), problems[0].label, problems[0].reason
        (1, 'cat', 'damaged, or none of JPEG, PNG, BMP, GIF, WEBP, TIFF, PPM.')
    """
    if on_error not in ("skip", "refuse"):
        raise ValueError(f'Received on_error={on_error!r}; expected "skip" or "refuse".')
    if isinstance(pictures, Split):
        listed = pictures.train.pictures + pictures.val.pictures
    else:
        listed = pictures.pictures
    reasons = _read_all(listed, workers or os.cpu_count() or 1, progress)
    bad = {picture.path: reason for picture, reason in zip(listed, reasons) if reason}
    problems = [
        Problem(picture.path, pictures.labels[picture.label], bad[picture.path])
        for picture in listed
        if picture.path in bad
    ]
    if problems and on_error == "refuse":
        first = some([f"{x.path} ({x.reason.rstrip('.')})" for x in problems])
        raise ValueError(
            f"{len(problems)} of {len(listed)} pictures cannot be used: {first}. Mend or "
            'remove them, or pass on_error="skip" to go on without them.'
        )
    return _without(pictures, bad), problems


def _read_all(
    pictures: Sequence[Picture], workers: int, progress: Callable[[int, int], None] | None
) -> list[str | None]:
    """What is wrong with each picture, None for the good ones."""
    reasons: list[str | None] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), _AT_ONCE):
            for reason in pool.map(_reason, pictures[start : start + _AT_ONCE]):
                reasons.append(reason)
                if progress is not None:
                    progress(len(reasons), len(pictures))
    return reasons


def _reason(picture: Picture) -> str | None:
    try:
        height, width, _ = read_picture(picture.path).shape
    except UnreadablePicture as error:
        return error.reason
    if min(height, width) < 2:
        return f"it has {width} x {height} pixels; expected at least 2 x 2."
    return None


def _without(pictures: Any, bad: dict[str, str]) -> Any:
    if isinstance(pictures, Split):
        train, val = _without(pictures.train, bad), _without(pictures.val, bad)
        lost = [label for label, count in train.counts().items() if not count]
        if lost:
            raise ValueError(
                f"No picture to train on can be used of: {some(lost)}. {_first(bad)} Mend "
                "them, add others, or remove the class."
            )
        return replace(pictures, train=train, val=val)
    left = tuple(picture for picture in pictures.pictures if picture.path not in bad)
    if not left:
        raise ValueError(
            f"None of {len(pictures)} pictures can be used. {_first(bad)} Mend them, or give "
            "others."
        )
    return replace(pictures, pictures=left)


def _first(bad: dict[str, str]) -> str:
    """An example of what is wrong."""
    return next((f"{path}: {reason.rstrip('.')}." for path, reason in bad.items()), "")
