"""``list_csv``: the pictures that a CSV file lists, with or without a split."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tfimm_lora.finetuning.data.findings import count, some
from tfimm_lora.finetuning.data.listing import PARTS, UNSPLIT, FoundPicture, Listing
from tfimm_lora.finetuning.data.targets import PATH, SPLIT, Row, Targets

#: What may separate the columns, the usual first.
_SEPARATORS = (",", ";", "\t", "|")

#: The names of columns that are recognized in upper case, too.
_KNOWN = (PATH, SPLIT, "label", "labels")


class _Line(NamedTuple):
    line: int
    cells: list[str]


class _Table(NamedTuple):
    header: list[str]
    rows: list[_Line]
    separator: str


def list_csv(path: Path, targets: Targets) -> Listing:
    """List the pictures of a CSV file with path, targets and, optionally, split.

    The columns are separated by commas, semicolons, tabs or vertical bars. The text is UTF-8 or
    UTF-16. Paths are absolute, or relative to the folder of the file; backslashes are
    understood on every system. Spaces around paths and labels are removed. A row that cannot be
    used is an error.
    """
    listing = Listing()
    table = _read(listing, path, targets)
    if table is None:
        return listing
    listing.columns = targets.columns(table.header)
    used = (PATH, SPLIT, *listing.columns)
    unknown = [x or "(no name)" for x in table.header if x not in used]
    if unknown:
        listing.warning(f"{path}: ignored {count(len(unknown), 'column')}: {some(unknown)}.")
    twice = [name for name in dict.fromkeys(used) if table.header.count(name) > 1]
    if twice:
        listing.error(
            f"{path} has more than one column with the name {some(twice)}; expected one."
        )
        return listing
    required = () if targets.may_be_empty else listing.columns
    rows = _complete_rows(listing, path, table, required)
    found = targets.read(listing, path, listing.columns, rows)
    _list_rows(listing, path, zip(rows, found), SPLIT in table.header)
    return listing


# -- text -----------------------------------------------------------------------------------


def _read(listing: Listing, path: Path, targets: Targets) -> _Table | None:
    """The table in a file, or None after recording why there is none."""
    try:
        text = _text(path.read_bytes())
    except UnicodeDecodeError as error:
        listing.error(f"{path} is not a CSV file in UTF-8 or UTF-16: {error}.")
        return None
    tables, fault = [], ""
    for separator in _SEPARATORS:
        try:
            tables.append(_split(text, separator))
        except csv.Error as error:
            fault = fault or str(error)
    for table in tables:
        if PATH in table.header and targets.columns(table.header):
            return table if _is_text(listing, path, table) else None
    best = max(tables, key=lambda table: len(table.header), default=None)
    if best is None:
        listing.error(f"{path} is not a CSV file: {fault}.")
    elif _is_text(listing, path, best):
        listing.error(
            f"{path} has the columns {', '.join(best.header) or '(none)'}; expected a first "
            f"line with {targets.header} (and optionally split)."
        )
    return None


def _text(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if b"\0" in data[:2]:  # UTF-16 without its mark: the first letter has a zero byte
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
    # File names may be any bytes, which Python keeps as surrogates. Spreadsheet programs write
    # a byte order mark.
    return data.decode("utf-8-sig", errors="surrogateescape")


def _split(text: str, separator: str) -> _Table:
    """Split a text into cells. Strict, for a quote that is never closed swallows all rows."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    lines = []
    try:
        lines += [
            _Line(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))
        ]
    except csv.Error as error:
        raise csv.Error(f"line {reader.line_num}: {error}") from error
    header = [name.strip() for name in lines[0].cells] if lines else []
    header = [name.lower() if name.lower() in _KNOWN else name for name in header]
    while header and not header[-1]:
        header.pop()
    return _Table(header, lines[1:], separator)


def _is_text(listing: Listing, path: Path, table: _Table) -> bool:
    """Whether all cells but the paths are text, which an error denies otherwise."""
    place = table.header.index(PATH) if PATH in table.header else -1
    others = [cell for row in table.rows for i, cell in enumerate(row.cells) if i != place]
    if any(
        "\udc80" <= letter <= "\udcff" for text in (*table.header, *others) for letter in text
    ):
        listing.error(f"{path} is not a CSV file in UTF-8 or UTF-16.")
        return False
    return True


# -- rows -----------------------------------------------------------------------------------


def _complete_rows(
    listing: Listing, path: Path, table: _Table, required: Sequence[str]
) -> list[Row]:
    """The rows without those that have too many cells, or no path or required cell."""
    width = len(table.header)
    good: list[Row] = []
    too_many, missing = [], []
    for line, cells in table.rows:
        row = {**dict.fromkeys(table.header, ""), **dict(zip(table.header, cells))}
        if any(cell.strip() for cell in cells[width:]):
            too_many.append(_Line(line, cells))
        elif not all(row[name].strip() for name in (PATH, *required)):
            missing.append(_Line(line, cells))
        else:
            good.append(Row(line, row))
    if too_many:
        listing.error(
            f"{path}: {_rows(too_many)} more than the {width} columns of the first line, "
            f"{', '.join(table.header)}: {too_many[0].cells}. Put quotes around a value that "
            f"contains {table.separator!r}.",
            [f"{path}, line {row.line}" for row in too_many],
        )
    if missing:
        both = "both in every row" if required else "one in every row"
        listing.error(
            f"{path}: {_rows(missing)} "
            f"{' or '.join(f'no {name}' for name in (PATH, *required))}: {missing[0].cells}; "
            f"expected {both}.",
            [f"{path}, line {row.line}" for row in missing],
        )
    return good


def _rows(rows: Sequence[_Line]) -> str:
    """ "line 3 has" or "lines 3, 5 have"."""
    lines = some([str(row.line) for row in rows])
    return f"line {lines} has" if len(rows) == 1 else f"lines {lines} have"


def _list_rows(
    listing: Listing, path: Path, rows: Iterable[tuple[Row, Any]], is_split: bool
) -> None:
    """List the pictures of rows with a target; those without one are recorded already."""
    parts: dict[str, list[FoundPicture]] = defaultdict(list)
    unknown: list[_Line] = []
    missing: list[str] = []
    for (line, row), target in rows:
        given = row.get(SPLIT, "")
        part = PARTS.get(given.strip().lower()) if is_split else UNSPLIT
        picture = _found(path.parent, row[PATH], target)
        if part is None:
            unknown.append(_Line(line, [given]))
        elif not os.path.isfile(picture.path):
            missing.append(row[PATH])
        elif target is not None:
            parts[part].append(picture)
    if unknown:
        listing.error(
            f"{path}: {_rows(unknown)} the split {unknown[0].cells[0]!r}; expected one of "
            f"{', '.join(PARTS)}. Leave the column out to split at random.",
            [f"{path}, line {row.line}" for row in unknown],
        )
    if missing:
        listing.error(
            f"{path} lists {count(len(missing), 'file')} that "
            f"{'does' if len(missing) == 1 else 'do'} not exist: {some(missing)}; expected "
            f"absolute paths, or paths relative to {path.parent}.",
            missing,
            FileNotFoundError,
        )
    if is_split and "val" not in parts and parts.get("train"):
        listing.warning(
            f"{path} has no rows for val; pictures of train are used for validation."
        )
        parts[UNSPLIT] = parts.pop("train")
    listing.parts = dict(parts)


def _found(folder: Path, given: str, target: Any) -> FoundPicture:
    """The file of a row. The name is used as it is, if there is such a file."""
    plain = given.strip()
    names = (given, plain, plain.replace("\\", "/"))
    file = next((name for name in names if os.path.isfile(folder / name)), names[-1])
    path = os.path.normpath(folder / file)
    return FoundPicture(Path(os.path.relpath(path, folder)).as_posix(), path, target)
