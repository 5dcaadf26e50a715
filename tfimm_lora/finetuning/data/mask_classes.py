"""``MaskClasses``: which pixels of a mask belong to which class."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.findings import some

#: The index of pixels that count in neither loss nor metrics.
IGNORED = -1

#: The index in a mask that is ignored, as in Pascal VOC, unless a class has it.
IGNORED_INDEX = 255

#: The name of a row of a table whose pixels are ignored.
IGNORE = "ignore"

_HEX = re.compile(r"#[0-9a-fA-F]{6}")

Value = int | str


@dataclass(frozen=True)
class MaskClasses:
    """Which pixels of a mask belong to which class.

    Args:
        names: The names of the classes, in the order of the outputs.
        values: The value of each class in masks: an index, or a colour such as "#ff0000".
        ignored: The values that count in neither loss nor metrics. Default: the index 255,
            unless it is that of a class.
        colours: The colour of each class in drawings and predicted masks. Default: the colours
            of Pascal VOC.

    Raises:
        ValueError: for fewer than two classes, or names or values that occur twice.

    Example:
        >>> from tfimm_lora.finetuning.data.mask_classes import MaskClasses
        >>> classes = MaskClasses(("road", "car"), (7, 26))
        >>> classes.indices(np.array([[7, 26, 255]])).tolist()
        [[0, 1, -1]]
    """

    names: tuple[str, ...]
    values: tuple[Value, ...]
    ignored: tuple[Value, ...] | None = None
    colours: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("names", "values", "ignored", "colours"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(given))
        if self.ignored is None:
            is_free = not self.of_colours and IGNORED_INDEX not in self.values
            object.__setattr__(self, "ignored", (IGNORED_INDEX,) if is_free else ())
        if len(self.names) < 2:
            raise ValueError(
                f"Received {len(self.names)} class{'' if len(self.names) == 1 else 'es'} "
                f"({', '.join(self.names)}); expected at least two, of which one may be the "
                "background."
            )
        for what, given in (("name", self.names), ("value", (*self.values, *self.unused))):
            twice = [str(x) for x in dict.fromkeys(given) if given.count(x) > 1]
            if twice:
                raise ValueError(
                    f"Received classes with the same {what}: {some(twice)}; expected different "
                    "ones."
                )

    @property
    def unused(self) -> tuple[Value, ...]:
        """The values that are ignored."""
        return self.ignored or ()

    @property
    def of_colours(self) -> bool:
        """Whether the values are colours."""
        return bool(self.values) and isinstance(self.values[0], str)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The value of each class as it is in the pixels of masks; see ``indices``."""
        return tuple(map(_number, self.values))

    @property
    def palette(self) -> np.ndarray:
        """The colour of each class, uint8 (classes, 3)."""
        given = self.values if self.of_colours else self.colours
        if given is None:
            return default_palette(len(self.names))
        return np.array([_rgb(str(colour)) for colour in given], np.uint8)

    def indices(self, pixels: np.ndarray) -> np.ndarray:
        """The class of each pixel, int32; -1 for those that are ignored.

        Args:
            pixels: Integers (h, w): the indices in a mask, or its colours as 0xrrggbb.

        Raises:
            ValueError: for a value that no class has.
        """
        known = {number: i for i, number in enumerate(self.numbers)}
        known.update(dict.fromkeys(map(_number, self.unused), IGNORED))
        keys = np.array(sorted(known), np.int64)
        places = np.searchsorted(keys, pixels).clip(max=len(keys) - 1)
        unknown = np.unique(pixels[keys[places] != pixels])
        if unknown.size:
            listed = some([self.text(int(x)) for x in unknown])
            raise ValueError(f"it has {listed}, which {_verb(unknown.size)} no class.")
        found: np.ndarray = np.array([known[key] for key in keys.tolist()], np.int32)[places]
        return found

    def unknown(self, values: Sequence[int]) -> list[int]:
        """Those of some values in masks that no class has."""
        known = set(map(_number, (*self.values, *self.unused)))
        return [value for value in values if value not in known]

    def text(self, number: int) -> str:
        """A value in a mask in words: "the index 7", "the colour #ff0000"."""
        if self.of_colours:
            return f"the colour {colour_text(number)}"
        return f"the index {number}"

    @property
    def expected(self) -> str:
        """The values of all classes in words."""
        pairs = [f"{value} ({name})" for name, value in zip(self.names, self.values)]
        more = f", or {some(list(map(str, self.unused)))} (ignored)" if self.unused else ""
        return f"{some(pairs, 12)}{more}"

    def to_dict(self) -> dict[str, Any]:
        """All but the names, as plain values for JSON and YAML."""
        values: dict[str, Any] = {"values": list(self.values), "ignored": list(self.unused)}
        if self.colours is not None:
            values["colours"] = list(self.colours)
        return values

    @classmethod
    def from_dict(cls, names: Sequence[str], values: Mapping[str, Any]) -> MaskClasses:
        """Create them from the result of ``to_dict``."""
        return cls(tuple(names), values["values"], values["ignored"], values.get("colours"))


def read_classes(path: str | Path) -> MaskClasses:
    """Read a table of classes.

    A CSV file has the columns ``name`` and ``index``, or ``name``, ``r``, ``g`` and ``b``, or
    all of them: then masks have the indices, and the colours are for drawings. With ``name``
    alone, the indices count from 0. A JSON file has a list of objects with the same names. The
    pixels of a row with the name "ignore" are ignored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Received classes={str(path)!r}, which does not exist; expected a CSV or JSON "
            "file with name and index, or name, r, g, b."
        )
    try:
        rows = _rows(path)
        return _of_rows(rows)
    except (ValueError, csv.Error) as error:  # also of JSON and UTF-8
        raise ValueError(
            f"{path} is not a table of classes: {error} Expected name and index, or name, r, g "
            "and b."
        ) from error


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it is not a list of objects.")
    else:
        first = text.partition("\n")[0]
        separator = max(",;\t", key=first.count)
        reader = csv.DictReader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        rows = [row for row in reader if any((cell or "").strip() for cell in row.values())]
    return [{str(key).strip().lower(): x for key, x in row.items()} for row in rows]


def _of_rows(rows: list[dict[str, Any]]) -> MaskClasses:
    if not rows or "name" not in rows[0]:
        raise ValueError(f"its columns are {', '.join(rows[0]) if rows else '(none)'}.")
    has_index, has_colour = "index" in rows[0], {"r", "g", "b"} <= rows[0].keys()
    names = [str(row.get("name") or "").strip() for row in rows]
    indices: list[Value] = [_integer(row, "index") for row in rows] if has_index else []
    colours = [_colour(row) for row in rows] if has_colour else []
    values: list[Value] = indices or [*colours] or [*range(len(rows))]
    kept = [i for i, name in enumerate(names) if name.lower() != IGNORE]
    ignored = [values[i] for i in range(len(rows)) if i not in kept]
    if not all(names):
        raise ValueError(f"the class of {values[names.index('')]} has no name.")
    return MaskClasses(
        tuple(names[i] for i in kept),
        tuple(values[i] for i in kept),
        tuple(ignored) if ignored else None,
        tuple(colours[i] for i in kept) if indices and colours else None,
    )


def _integer(row: Mapping[str, Any], column: str) -> int:
    cell = str(row.get(column) if row.get(column) is not None else "").strip()
    if not re.fullmatch(r"\d+", cell):
        raise ValueError(f"the class {row.get('name')!r} has {column} {cell!r}.")
    return int(cell)


def _colour(row: Mapping[str, Any]) -> str:
    r, g, b = (_integer(row, column) for column in "rgb")
    if max(r, g, b) > 255:
        raise ValueError(f"the class {row.get('name')!r} has the colour {r}, {g}, {b}.")
    return f"#{r:02x}{g:02x}{b:02x}"


def _number(value: Value) -> int:
    """A value as it is in the pixels of a mask."""
    return int(value[1:], 16) if isinstance(value, str) else value


def colour_text(number: int) -> str:
    """The text of a colour 0xrrggbb.

    Example:
        >>> from tfimm_lora.finetuning.data.mask_classes import colour_text
        >>> colour_text(0xFF0080)
        '#ff0080 (255, 0, 128)'
    """
    return f"#{number:06x} {_rgb(f'#{number:06x}')}"


def _rgb(colour: str) -> tuple[int, ...]:
    if not _HEX.fullmatch(colour):
        raise ValueError(f"Received the colour {colour!r}; expected one such as '#ff0000'.")
    return tuple(bytes.fromhex(colour[1:]))


def _verb(number: int) -> str:
    return "is of" if number == 1 else "are of"


def default_palette(count: int) -> np.ndarray:
    """The colours of Pascal VOC, uint8 (count, 3): black, dark red, dark green, ...

    The bits of an index, in groups of three, are the bits of red, green and blue from the
    highest on.
    """
    numbers = np.arange(count)[:, None]
    colours = np.zeros((count, 3), np.uint8)
    for group in range(8):
        bits = numbers >> (3 * group + np.arange(3)) & 1
        colours |= (bits << (7 - group)).astype(np.uint8)
    return colours
