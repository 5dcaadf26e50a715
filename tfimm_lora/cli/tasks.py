"""``--task`` and ``--columns`` of the commands that read labelled pictures."""

from __future__ import annotations

TASK_HELP = (
    "classification (one class for each picture), multilabel (several labels), regression "
    "(numbers) or segmentation (a class for each pixel). Default: classification."
)
COLUMNS_HELP = (
    "For multilabel and regression: the columns of the CSV file with the labels or numbers, "
    "separated by commas. Default: all except path and split."
)
MASKS_HELP = (
    "For segmentation: the folder of the masks, which have the names of their pictures, or a "
    "file of COCO (.json). Default: masks/ beside images/ in the folder of the pictures."
)
CLASSES_HELP = (
    "For segmentation: a CSV or JSON file with name and index, or name, r, g, b. Default: each "
    "index in the masks is a class, except 255, which is ignored; or the categories of COCO."
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
