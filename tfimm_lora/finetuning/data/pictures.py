"""``read_picture`` reads a file as an array, ``decode_picture`` the bytes of one.

``check_pictures`` checks all files.

This is the only module that reads pictures, so training, evaluation and prediction get what was
checked.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from tfimm_lora.backend import installed
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, Split
from tfimm_lora.finetuning.data.duplicates import (
    Fingerprint,
    fingerprint,
    identical_pictures,
    similar_pictures,
)
from tfimm_lora.finetuning.data.findings import Finding, Problem, raise_errors, some, warn
from tfimm_lora.finetuning.data.picture_files import is_heif
from tfimm_lora.utils.optional_imports import require

#: The formats that Pillow may read, whatever the suffix; none of them starts other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF")

#: What pillow-heif calls HEIC.
_HEIF = "HEIF"

_ORIENTATION = 0x0112  # of EXIF
_BITS_PER_SAMPLE = 258  # of TIFF

#: The first bytes of a JPEG file, and the marker of each of its scans. A progressive picture
#: has about ten. Decoding one takes as long as all pixels do, but it may have few bytes, so a
#: small file with many would take hours.
_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
_MOST_SCANS = 100

#: The number of pictures submitted to the threads at a time, so that an interruption is quick.
_BLOCK = 256

Pictures = TypeVar("Pictures", Split, PictureSet)


class UnreadablePicture(ValueError):
    """A file is damaged or not a picture. Attributes: ``path`` and ``reason``."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Cannot read the picture {path}: {reason}")
        self.path = path
        self.reason = reason


def read_picture(
    path: str | os.PathLike[str], channels: int = 3, *, at_least: int | None = None
) -> np.ndarray:
    """Read a file as an 8-bit RGB or grey picture.

    Palettes, grey pictures and CMYK are converted to RGB, transparent parts become white, 16
    bits are scaled to 8, and the EXIF orientation is applied. The first frame of an animation
    is read. Colour profiles are not applied, as in timm.

    Args:
        path: A jpeg, png, bmp, gif, webp, tiff, ppm, pgm or avif file, with any suffix; with
            the package pillow-heif also a heic file.
        channels: 3 for RGB, 1 for grey.
        at_least: The number of pixels that each side needs at least. A large jpeg is then read
            at a half, a quarter or an eighth of its size, which is several times faster.
            Default: the full size.

    Returns:
        An array of uint8, (height, width, channels).

    Raises:
        ValueError: for another number of channels.
        UnreadablePicture: (a ValueError) if the file is missing, damaged, truncated, not a
            picture, too large for the limit of Pillow, or has 32 bits, whose range is unknown.
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
    with open_pixels(path, at_least) as image:
        return _pixels(image, channels, image_module)


@contextlib.contextmanager
def open_pixels(path: str | os.PathLike[str], at_least: int | None = None) -> Iterator[Any]:
    """Open a file with Pillow, and load its pixels. What fails in the block is its fault.

    Args:
        path, at_least: As for ``read_picture``.

    Raises:
        UnreadablePicture: (a ValueError) as ``read_picture``.
    """
    image_module = require("PIL.Image", extra="cli", why="Reading pictures")
    try:
        with image_module.open(path, formats=_formats()) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            yield image
    except UnreadablePicture:
        raise
    except image_module.UnidentifiedImageError:
        reason = f"damaged, or none of {', '.join(_formats())}."
        if is_heif(path) and _HEIF not in _formats():
            reason = (
                "it is a HEIC or AVIF file, which needs the package pillow-heif. Install it "
                'with: pip install "tfimm_lora[heif]"'
            )
        raise UnreadablePicture(os.fspath(path), reason) from None
    except Exception as error:  # decoders may raise anything for damaged files
        raise UnreadablePicture(os.fspath(path), str(error) or type(error).__name__) from error


def decode_picture(
    content: bytes, channels: int, *, formats: Sequence[str], most_pixels: int
) -> np.ndarray:
    """Decode the bytes of an untrusted file to the array that ``read_picture`` returns.

    Args:
        content: The content of the file.
        channels: 3 for RGB, 1 for grey.
        formats: The formats that are allowed, as Pillow calls them: "JPEG", "PNG", ...
        most_pixels: The most pixels, width times height. The size is read from the header,
            before anything is decoded.

    Returns:
        An array of uint8, (height, width, channels).

    Raises:
        UnreadablePicture: (a ValueError) if the content is not a picture of these formats, is
            damaged or truncated, or has too many pixels. Its path is "".
        ImportError: without Pillow.
    """
    image_module = require("PIL.Image", extra="cli", why="Reading pictures")
    scans = content.count(_START_OF_SCAN)
    if content.startswith(_JPEG) and scans > _MOST_SCANS:
        raise UnreadablePicture("", f"it has {scans} scans; expected at most {_MOST_SCANS}.")
    try:
        with image_module.open(io.BytesIO(content), formats=formats) as image:
            width, height = image.size
            if width * height > most_pixels:
                raise ValueError(
                    f"it has {width} x {height} pixels; expected at most {most_pixels}."
                )
            return _pixels(image, channels, image_module)
    except image_module.UnidentifiedImageError:
        reason = f"damaged, or none of {', '.join(formats)}."
        raise UnreadablePicture("", reason) from None
    except Exception as error:  # decoders may raise anything for damaged files
        raise UnreadablePicture("", str(error) or type(error).__name__) from error


def _pixels(image: Any, channels: int, image_module: Any) -> np.ndarray:
    """The pixels of an opened picture, upright and in RGB or grey."""
    image.load()
    rgb = _upright(image, _rgb(image, image_module), image_module)
    array = np.array(rgb if channels == 3 else rgb.convert("L"))
    return array.reshape(*array.shape[:2], channels)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow reads, with HEIC if pillow-heif is installed."""
    image_module = require("PIL.Image", extra="cli", why="Reading pictures")
    if installed("pillow_heif"):
        require("pillow_heif", extra="heif", why="Reading HEIC files").register_heif_opener()
    image_module.init()
    return tuple(name for name in (*_FORMATS, _HEIF) if name in image_module.OPEN)


def _rgb(image: Any, image_module: Any) -> Any:
    """Convert a loaded picture of any mode to RGB, on a white background."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, image_module)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = image_module.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")


def _eight_bits(image: Any, image_module: Any) -> Any:
    """Convert a 16-bit grey picture to 8 bits."""
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            "it has 32 bits or signed values, whose range is unknown. Save it with 8 or 16 "
            "bits."
        )
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0]  # 12 from some microscopes
    values = np.asarray(image).astype(np.float64)
    transparent = values == image.info.get("transparency", -1)
    values = np.where(transparent, 255, np.rint(values * (255 / (2**bits - 1))))
    return image_module.fromarray(values.astype(np.uint8))


def _upright(image: Any, pixels: Any, image_module: Any) -> Any:
    """Rotate or flip the pixels according to the EXIF orientation of the file."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - the picture is usable although its EXIF data are damaged
        return pixels
    method = image_module.Transpose
    methods = {
        2: method.FLIP_LEFT_RIGHT,
        3: method.ROTATE_180,
        4: method.FLIP_TOP_BOTTOM,
        5: method.TRANSPOSE,
        6: method.ROTATE_270,
        7: method.TRANSVERSE,
        8: method.ROTATE_90,
    }
    return pixels.transpose(methods[orientation]) if orientation in methods else pixels


def check_pictures(
    pictures: Pictures,
    on_error: str = "skip",
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pictures, list[Problem]]:
    """Read every picture once before training and remove those that cannot be used.

    These are pictures that ``read_picture`` cannot read, and pictures with a side of one pixel.
    In a ``Split`` they are also identical files with different labels, and the training
    picture of two identical ones in train and val. The check takes about as long as reading the
    pictures of one epoch: 2 ms for a jpeg of 512 x 512 pixels, 0.1 s for one of 12 megapixels,
    divided by the number of cores.

    Args:
        pictures: A ``Split`` or a ``PictureSet``.
        on_error: "skip" to remove bad pictures, "refuse" to raise an error if there are any.
        workers: The number of threads. Default: the number of cores.
        progress: A function that is called as ``progress(done, total)`` after each picture.

    Returns:
        A ``Split`` or ``PictureSet`` without the bad pictures, and a list of ``Problem``.

    Raises:
        ValueError: with "refuse", after all pictures were read, if some cannot be used; if a
            class has no training pictures left; if a part of the split is empty.

    Warns:
        UserWarning: about pictures of a ``Split`` that look alike.

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
        (1, 'cat', 'damaged, or none of JPEG, PNG, BMP, GIF, WEBP, TIFF, PPM, AVIF.')
    """
    if on_error not in ("skip", "refuse"):
        raise ValueError(f'Received on_error={on_error!r}; expected "skip" or "refuse".')
    problems, findings = inspect_pictures(pictures, workers=workers, progress=progress)
    if problems and on_error == "refuse":
        first = some([f"{x.path} ({x.reason.rstrip('.')})" for x in problems])
        raise ValueError(
            f"{len(problems)} of {len(pictures)} pictures cannot be used: {first}. Repair or "
            'remove them, or pass on_error="skip" to continue without them.'
        )
    raise_errors(findings)
    warn(findings, stacklevel=2)
    return without(pictures, problems), problems


def inspect_pictures(
    pictures: Split | PictureSet,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Problem], list[Finding]]:
    """Read every picture once; return those that cannot be used, errors and warnings."""
    parts = [pictures] if isinstance(pictures, PictureSet) else list(pictures.parts().values())
    listed = [picture for part in parts for picture in part.pictures]
    readings = _read_all(listed, workers or os.cpu_count() or 1, progress)
    problems = [
        Problem(picture.path, parts[0].text(picture), reading)
        for picture, reading in zip(listed, readings)
        if isinstance(reading, str)
    ]
    prints = {
        picture.path: reading
        for picture, reading in zip(listed, readings)
        if isinstance(reading, Fingerprint)
    }
    sizes = {path: reading.size for path, reading in prints.items()}
    named = {"": pictures} if isinstance(pictures, PictureSet) else pictures.parts()
    more, findings = parts[0].targets.inspect(named, sizes)
    bad = {x.path for x in problems}
    problems += [x for x in more if x.path not in bad]
    if isinstance(pictures, PictureSet):
        return problems, findings
    identical, others = identical_pictures(pictures, prints)
    bad |= {x.path for x in more}
    problems += [x for x in identical if x.path not in bad]
    return problems, [*findings, *others, *similar_pictures(pictures, prints)]


def _read_all(
    pictures: Sequence[Picture], workers: int, progress: Callable[[int, int], None] | None
) -> list[Fingerprint | str]:
    """The fingerprint of each picture, or the reason why it cannot be used."""
    readings: list[Fingerprint | str] = []
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), _BLOCK):
            for reading in pool.map(_read, pictures[start : start + _BLOCK]):
                readings.append(reading)
                if progress is not None:
                    progress(len(readings), len(pictures))
    return readings


def _read(picture: Picture) -> Fingerprint | str:
    try:
        pixels = read_picture(picture.path)
    except UnreadablePicture as error:
        return error.reason
    height, width, _ = pixels.shape
    if min(height, width) < 2:
        return f"it has {width} x {height} pixels; expected at least 2 x 2."
    return fingerprint(picture.path, pixels)


def without(pictures: Pictures, problems: Sequence[Problem]) -> Pictures:
    """The pictures without those that cannot be used.

    Raises:
        ValueError: if a class has no training pictures left, or a part is empty.
    """
    return _without(pictures, {x.path: x.reason for x in problems})  # type: ignore[no-any-return]


def _without(pictures: Any, bad: Mapping[str, str]) -> Any:
    if isinstance(pictures, Split):
        parts = {name: _without(part, bad) for name, part in pictures.parts().items()}
        before, after = pictures.train.counts(), parts["train"].counts()
        lost = [label for label in after if before[label] and not after[label]]
        if lost:
            raise ValueError(
                f"No training pictures of these {pictures.targets.nouns} can be used: "
                f"{some(lost)}. {_first(bad)} Repair them, add others, or remove the "
                f"{pictures.targets.noun}."
            )
        targets = pictures.targets
        known = targets.faults(pictures.train)
        faults = [fault for fault in targets.faults(parts["train"]) if fault not in known]
        if faults:
            raise ValueError(f"Of the pictures that can be used: {' '.join(faults)}")
        return replace(pictures, **parts)
    left = tuple(picture for picture in pictures.pictures if picture.path not in bad)
    if not left:
        raise ValueError(
            f"None of {len(pictures)} pictures can be used. {_first(bad)} Repair them, or pass "
            "other pictures."
        )
    return replace(pictures, pictures=left)


def _first(bad: Mapping[str, str]) -> str:
    """The first unusable picture, with the reason."""
    return next((f"{path}: {reason.rstrip('.')}." for path, reason in bad.items()), "")
