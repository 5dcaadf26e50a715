"""Which files are pictures, by suffix or, without one, by their first bytes."""

from __future__ import annotations

import os
import re

#: The suffixes of picture files in folders, in lower case.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".heif"),
)

#: What the files of these formats begin with.
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF8", b"II*\0", b"MM\0*"),
    *(b"P5\n", b"P6\n", b"P5 ", b"P6 "),
)

#: The brands of HEIC and AVIF files.
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")

#: Files that systems put into folders of pictures. They are ignored without a warning.
_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file has the suffix of a picture, or none and begins like one."""
    name = os.path.basename(path)
    if name.lower().endswith(EXTENSIONS):
        return True
    return not os.path.splitext(name)[1] and _begins_like_a_picture(path)


def is_hidden(name: str) -> bool:
    """Whether a name is that of a hidden file, or of one that a system put there."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def is_heif(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one in HEIC (a picture of an iPhone) or AVIF."""
    return _first_bytes(path)[4:12] in [b"ftyp" + brand for brand in _BRANDS]


def _begins_like_a_picture(path: str | os.PathLike[str]) -> bool:
    first = _first_bytes(path)
    if first[:4] == b"RIFF" and first[8:12] == b"WEBP":
        return True
    return first.startswith(_SIGNATURES) or is_heif(path)


def _first_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A sort key that compares numbers in names by value: "2" before "10".

    Example:
        >>> from tfimm_lora.finetuning.data.picture_files import natural_order
        >>> sorted(["b", "a10", "A2"], key=natural_order)
        ['A2', 'a10', 'b']
    """
    pieces = re.split(r"(\d+)", name.casefold())
    return [int(x) if i % 2 else x for i, x in enumerate(pieces)], name
