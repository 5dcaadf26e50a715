"""``metrics.csv``, with one row for each epoch."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tfimm_lora.utils.atomic_files import write_file


def write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    """Write the metrics of all epochs, numbered from 1."""
    names = list(dict.fromkeys(name for numbers in history for name in numbers))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", *names])
    for epoch, numbers in enumerate(history, start=1):
        table.writerow([epoch, *(repr(numbers[n]) if n in numbers else "" for n in names)])
    write_file(path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the metrics of all epochs, as ``write_metrics`` received them."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: float(value) for name, value in row.items() if name != "epoch" and value}
        for row in rows
    ]
