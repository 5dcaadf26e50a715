"""Tables on stdout: drawn by rich on a terminal, plain and complete in a pipe or file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from tfimm_lora.utils.optional_imports import require

#: A column of text is not made narrower than that.
_NARROWEST = 20


def show_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()
) -> None:
    """Print rows under headers.

    Nothing is ever cut. On a terminal long texts are broken over several lines; elsewhere
    every row is one line, whatever its length.

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
    library = require("rich.table", extra="cli")
    text = require("rich.text", extra="cli").Text
    measured = require("rich.measure", extra="cli").Measurement
    console = require("rich.console", extra="cli").Console()
    table = library.Table(
        box=require("rich.box", extra="cli").SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i, (header, column, is_left) in enumerate(zip(headers, zip(*rows), to_left)):
        # Only texts are broken, and a name is none.
        width = max(map(len, (header, *column)))
        least = min(width, _NARROWEST) if i and is_left else width
        justify = "left" if is_left else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*map(text, row))
    # Where that is still too wide the terminal breaks the lines.
    unlimited = console.options.update(max_width=1 << 20)
    console.width = max(console.width, measured.get(console, unlimited, table).minimum)
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
