"""Tables on stdout: with rich on a terminal, as plain text in a pipe or file."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

from tfimm_lora.utils.optional_imports import require
from tfimm_lora.utils.text_table import aligned_lines

#: The smallest width of a column of text.
_LEAST_WIDTH = 20


def show_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()
) -> None:
    """Print a table.

    Nothing is truncated. On a terminal long texts are wrapped; elsewhere every row is one line.

    Args:
        headers: The names of the columns.
        rows: The cells, printed literally: "[...]" is not markup.
        left: The columns of text, which are left-aligned like the first column. The others,
            of numbers, are right-aligned.
    """
    is_left = [i == 0 or header in left for i, header in enumerate(headers)]
    if sys.stdout.isatty():
        _show_with_rich(headers, rows, is_left)
    else:
        for line in aligned_lines([headers, *rows], is_left):
            print(line)


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair per line."""
    for line in aligned_lines(facts, [True, True]):
        print(line)


def _show_with_rich(
    headers: Sequence[str], rows: Sequence[Sequence[str]], is_left: Sequence[bool]
) -> None:
    library = require("rich.table", extra="cli")
    text = require("rich.text", extra="cli").Text
    measurement = require("rich.measure", extra="cli").Measurement
    console = require("rich.console", extra="cli").Console()
    table = library.Table(
        box=require("rich.box", extra="cli").SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for i, (header, column, to_left) in enumerate(zip(headers, zip(*rows), is_left)):
        # Only columns of text are wrapped; the first column has names, which stay whole.
        width = max(map(len, (header, *column)))
        least = min(width, _LEAST_WIDTH) if i and to_left else width
        justify = "left" if to_left else "right"
        table.add_column(header, justify=justify, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*map(text, row))
    # If the table is still too wide, the terminal wraps its lines.
    unlimited = console.options.update(max_width=1 << 20)
    console.width = max(console.width, measurement.get(console, unlimited, table).minimum)
    console.print(table)
