"""``NumberTargets``: each picture has one or several numbers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.data.findings import ERROR
from tfimm_lora.finetuning.data.folders import csv_inside
from tfimm_lora.finetuning.data.listing import FoundPicture, Listing
from tfimm_lora.finetuning.data.targets import (
    PATH,
    Row,
    Targets,
    bad_cells,
    hash_order,
    other_columns,
    validation_count,
)

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.dataset import PictureSet, Split

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

#: The least standard deviation, relative to the largest number, that float32 resolves well.
_LEAST_SPREAD = 1e-5


@dataclass(frozen=True)
class NumberTargets(Targets):
    """One or several numbers for each picture, from a CSV file.

    ``Picture.label`` is a tuple of them.

    Args:
        given: The columns with the numbers. Default: all except path and split.
    """

    given: tuple[str, ...] | None = None

    noun: ClassVar[str] = "target"
    nouns: ClassVar[str] = "targets"
    alike_agree: ClassVar[bool] = False

    @property
    def header(self) -> str:
        if self.given is None:
            return "path and a column for each number"
        return ",".join((PATH, *self.given))

    # -- reading -------------------------------------------------------------------------

    def columns(self, header: Sequence[str]) -> tuple[str, ...]:
        if self.given is None:
            return other_columns(header)
        return self.given if set(self.given) <= set(header) else ()

    def read(
        self, listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
    ) -> list[Any]:
        values = bad_cells(listing, path, columns, rows, _number, "a finite number")
        return [None if row is None else tuple(zip(columns, row)) for row in values]

    def of_folder(self, listing: Listing, path: Path) -> None:
        listing.parts = {}
        listing.findings = []
        listing.error(
            f"Received the folder {path} for a regression; expected a CSV file with "
            f"{self.header}. A folder has no numbers.{csv_inside(path)}"
        )

    def names(self, listing: Listing, path: str) -> tuple[str, ...]:
        if not any(listing.parts.values()):
            if not any(x.level == ERROR for x in listing.findings):
                listing.error(f"{path} has no pictures; expected at least two.")
            return ()
        return listing.columns

    # -- parts ---------------------------------------------------------------------------

    def names_in(self, target: Any) -> tuple[str, ...]:
        return tuple(name for name, _ in target)

    def divided(
        self, found: Sequence[FoundPicture], validation: float, seed: int
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Sort all pictures by the hashes of their names; the first go to val."""
        pictures = sorted(found, key=hash_order(seed))
        number = validation_count(len(pictures), validation)
        return pictures[number:], pictures[:number]

    def faults(self, train: PictureSet) -> list[str]:
        found = []
        values = np.array([picture.label for picture in train.pictures], np.float64)
        for name, column in zip(train.labels, values.T):
            largest, spread = np.abs(column).max(), column.std()
            if column.min() == column.max():
                found.append(
                    f"the target {name} is {column[0]:g} for all {len(train)} training "
                    "pictures; expected different numbers. Leave it out."
                )
            elif spread < _LEAST_SPREAD * largest:
                found.append(
                    f"the target {name} has a standard deviation of {spread:.2g} with numbers "
                    f"up to {largest:.6g}; expected at least {_LEAST_SPREAD:g} of it, which "
                    "float32 resolves. Subtract a constant from all numbers."
                )
        return found

    # -- numbers -------------------------------------------------------------------------

    def label(self, target: Any, names: Sequence[str]) -> tuple[float, ...]:
        values = dict(target)
        return tuple(values[name] for name in names)

    def array(self, labels: Sequence[Any]) -> np.ndarray:
        return np.array(labels, np.float32)

    def text(self, label: Any, names: Sequence[str]) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in zip(names, label))

    def counts(self, pictures: PictureSet) -> dict[str, int]:
        return dict.fromkeys(pictures.labels, len(pictures))

    def cells(self, label: Any, names: Sequence[str]) -> dict[str, str]:
        return {name: repr(float(value)) for name, value in zip(names, label)}

    def table(self, split: Split, left_out: Counter[str]) -> tuple[list[str], list[list[str]]]:
        """The numbers of pictures, and the range of each target in the training part."""
        header, rows = super().table(split, left_out)
        values = np.array([x.label for x in split.train.pictures], np.float64)
        for row, column in zip(rows, values.T):
            numbers = (column.min(), column.mean(), column.max(), column.std())
            row += [f"{number:.4g}" for number in numbers]
        rows[-1] += [""] * 4
        return [*header, "min", "mean", "max", "std"], rows


def _number(cell: str) -> float:
    """A finite number. "nan", "inf" and "1_000", which Python reads, are none."""
    value = float(cell) if _NUMBER.fullmatch(cell) else math.nan
    if not math.isfinite(value):
        raise ValueError
    return value
