"""Tables on stdout: drawn by rich on a terminal, plain and complete in a pipe or file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from tfimm_lora.optional import require


def show_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()
) -> None:
    """Print rows under headers.

    On a terminal long texts are broken over several lines, never cut; elsewhere every row is
    one line, whatever its length.

    Args:
        headers: The names of the columns.
        rows: The cells as text, printed as they are: "[...]" is no markup.
        left: The columns that go to the left beside the first, which always does: those of
            text. The others, of numbers, go to the right.
    """
    to_left = [i == 0 or header in left for i, header in enumerate(headers)]
    if sys.stdout.isatty():
        _show_with_rich(headers, rows, to_left)
    else:
        for line in _aligned([headers, *rows], to_left):
            print(line)


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and what is so, one a line."""
    for line in _aligned(facts, [True, True]):
        print(line)


def byte_text(count: int) -> str:
    """A number of bytes for people: "1.2 MB".

    Example:
        >>> byte_text(999), byte_text(1_240_000)
        ('999 bytes', '1.2 MB')
    """
    if count < 1000:
        return f"{count} bytes"
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    while size >= 999.95 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.1f} {unit}"


def _show_with_rich(
    headers: Sequence[str], rows: Sequence[Sequence[str]], to_left: Sequence[bool]
) -> None:
    console = require("rich.console", extra="cli").Console()
    text = require("rich.text", extra="cli").Text
    library = require("rich.table", extra="cli")
    table = library.Table(box=require("rich.box", extra="cli").SIMPLE_HEAD, pad_edge=False)
    for header, is_left in zip(headers, to_left):
        table.add_column(header, justify="left" if is_left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(text, row))
    console.print(table)


def _aligned(rows: Sequence[Sequence[str]], to_left: Sequence[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, to_left)
        ).rstrip()
        for row in rows
    ]
