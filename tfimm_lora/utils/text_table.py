"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned_lines(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """The rows of a table as lines of text, with two spaces between the columns.

    Args:
        rows: The cells; all rows have the same number of columns.
        left: For each column whether it is left-aligned. The others are right-aligned.

    Example:
        >>> aligned_lines([["layer", "rank"], ["fc1", "8"]], left=[True, False])
        ['layer  rank', 'fc1       8']
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left)
        ).rstrip()
        for row in rows
    ]
