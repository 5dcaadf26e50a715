"""``--task`` and ``--columns`` of the commands that read labelled pictures."""

from __future__ import annotations

TASK_HELP = (
    "classification (one class for each picture), multilabel (several labels) or regression "
    "(numbers). Default: classification."
)
COLUMNS_HELP = (
    "For multilabel and regression: the columns of the CSV file with the labels or numbers, "
    "separated by commas. Default: all except path and split."
)


def parse_columns(text: str | None) -> list[str] | None:
    """Parse ``--columns``.

    Example:
        >>> parse_columns("angle, size"), parse_columns(None)
        (['angle', 'size'], None)
    """
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]
