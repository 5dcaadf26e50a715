"""HTML elements whose text is escaped."""

from __future__ import annotations

import base64
import html
import io
import struct
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.finetuning.report.formatting import readable
from tfimm_lora.utils.optional_imports import require

_VOID = frozenset(("img", "meta", "source"))


class Html(str):
    """Text that is HTML already and is not escaped."""


def tag(name: str, /, *children: str | None, **attributes: Any) -> Html:
    """Create an element.

    Args:
        name: The name of the element.
        children: The content. ``Html`` is not escaped, other text is; None is skipped.
        attributes: The attributes, with "_" instead of "-" and "class_" for "class". Values of
            None are skipped.

    Example:
        >>> tag("p", "a < b, ", tag("b", "bold"), class_="note")
        '<p class="note">a &lt; b, <b>bold</b></p>'
    """
    named = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    text = "".join(f' {key}="{escaped(str(v))}"' for key, v in named if v is not None)
    if name in _VOID:
        return Html(f"<{name}{text}>")
    return Html(f"<{name}{text}>{joined(*children)}</{name}>")


def joined(*children: str | None) -> Html:
    """Join several children."""
    return Html("".join(x if isinstance(x, Html) else escaped(x) for x in children if x))


def escaped(text: str) -> str:
    """Escape a text for HTML, with its line breaks."""
    return html.escape("\n".join(readable(line) for line in text.split("\n")))


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """A data URI with the content of a file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def drawing(light: bytes, dark: bytes, alt: str, dots_per_inch: int = 150) -> Html:
    """A PNG drawing in two versions, for light and dark colour schemes."""
    width, height = struct.unpack(">II", light[16:24])
    size = {"width": round(width * 96 / dots_per_inch)}
    size["height"] = round(height * 96 / dots_per_inch)
    is_dark = "(prefers-color-scheme: dark)"
    return tag(
        "picture",
        tag("source", srcset=data_uri(dark), media=is_dark),
        tag("img", src=data_uri(light), alt=alt, **size),
    )


def thumbnail(path: str, side: int = 224) -> Html:
    """A small version of a picture file, without its metadata.

    Raises:
        UnreadablePicture: if the file cannot be read.
    """
    return thumbnail_of(read_picture(path, at_least=side), side)


def thumbnail_of(pixels: np.ndarray, side: int) -> Html:
    """A small version of a picture, uint8 (h, w, 3)."""
    image_module = require("PIL.Image", extra="cli", why="The pictures of a report")
    image = image_module.fromarray(pixels)
    image.thumbnail((side, side))
    written = io.BytesIO()
    if max(image.size) < 64:  # individual pixels are visible, so avoid JPEG artifacts
        image.save(written, "PNG")
        return tag("img", src=data_uri(written.getvalue()), alt="", class_="tiny")
    image.save(written, "JPEG", quality=82)
    return tag("img", src=data_uri(written.getvalue(), "image/jpeg"), alt="")
