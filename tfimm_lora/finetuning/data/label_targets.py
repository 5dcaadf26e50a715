"""``LabelTargets``: each picture has any number of labels."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.data.findings import ERROR, count, some
from tfimm_lora.finetuning.data.listing import FoundPicture, Listing
from tfimm_lora.finetuning.data.picture_files import natural_order
from tfimm_lora.finetuning.data.targets import (
    PATH,
    SPLIT,
    Row,
    Targets,
    bad_cells,
    hash_order,
    other_columns,
    validation_count,
    warn_of_alike,
)

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.dataset import PictureSet

#: The columns of CSV files with all labels of a picture in one cell, and their separators.
_CELLS = ("labels", "label")
_SEPARATORS = re.compile(r"[|;,]")

#: What a cell says about one label.
_YES_OR_NO = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), True),
    **dict.fromkeys(("0", "0.0", "false", "no"), False),
}


@dataclass(frozen=True)
class LabelTargets(Targets):
    """Any number of labels for each picture. ``Picture.label`` has 1.0 or 0.0 for each label.

    In a CSV file either a column ``labels`` has all labels of a picture, separated by ``|``,
    ``;`` or commas, or there is a column for each label with 1 or 0. In class folders, a
    picture that is in several of them has several labels. Files with the same content are the
    same picture.

    Args:
        given: The columns of the labels, one for each. Default: a column ``labels`` or
            ``label`` or, without one, all columns except path and split.
        known: Whether these are the labels of a model: they may then be in one column, too.
    """

    given: tuple[str, ...] | None = None
    known: bool = False

    noun: ClassVar[str] = "label"
    nouns: ClassVar[str] = "labels"

    @property
    def header(self) -> str:
        if self.given is None:
            return "path,labels or path and a column for each label"
        one = " or path,labels" if self.known else ""
        return ",".join((PATH, *self.given)) + one

    # -- reading -------------------------------------------------------------------------

    def columns(self, header: Sequence[str]) -> tuple[str, ...]:
        in_one = [name for name in _CELLS if name in header][:1]
        if self.given is not None:
            if set(self.given) <= set(header):
                return self.given
            return tuple(in_one) if self.known else ()
        return tuple(in_one) or other_columns(header)

    def read(
        self, listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
    ) -> list[Any]:
        in_one_cell = columns[0] in _CELLS and columns != self.given
        return (_cells if in_one_cell else _columns)(listing, path, columns, rows)

    def of_folder(self, listing: Listing, path: Path) -> None:
        if self.given is not None and not self.known:
            listing.error(
                f"Received columns={list(self.given)} with the folder {path}; expected a CSV "
                "file. The labels of a folder are the names of its class folders."
            )
        for name, part in listing.parts.items():
            listing.parts[name] = _merged(listing, path, part)

    def names(self, listing: Listing, path: str) -> tuple[str, ...]:
        found = [x for part in listing.parts.values() for x in part]
        labels = listing.columns
        if not labels or (labels[0] in _CELLS and labels != self.given):
            labels = tuple(sorted({name for x in found for name in x.label}, key=natural_order))
        if not (found and labels):
            if not any(x.level == ERROR for x in listing.findings):
                what = "pictures" if labels else "labels"
                listing.error(f"{path} has no {what}; expected at least one.")
            return ()
        reserved = [x for x in labels if x.lower() in (PATH, SPLIT, *_CELLS)]
        if reserved:
            listing.error(
                f"{path} has labels with the name of a column, {some(reserved)}; expected "
                "other names."
            )
            return ()
        warn_of_alike(listing, path, labels, self.nouns)
        return labels

    # -- parts ---------------------------------------------------------------------------

    def names_in(self, target: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = target
        return names

    def divided(
        self, found: Sequence[FoundPicture], validation: float, seed: int
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Divide pictures so that each label has its share (iterative stratification).

        Labels are divided one after the other, that with the fewest pictures left first. Each
        of its pictures goes to the part that still needs more pictures of the label, else to
        the part that needs more pictures.

        Reference: Sechidis et al., "On the stratification of multi-label data", ECML PKDD 2011,
        algorithm 1.
        """
        pictures = sorted(found, key=hash_order(seed))
        frequency = Counter(name for x in pictures for name in x.label)
        total = {"val": validation_count(len(pictures), validation)}
        total["train"] = len(pictures) - total["val"]
        wanted = {
            name: {"val": (n := validation_count(number, validation)), "train": number - n}
            for name, number in frequency.items()
        }
        parts: dict[str, list[FoundPicture]] = {"train": [], "val": []}
        left = dict(enumerate(pictures))

        def give(place: int, need: dict[str, int]) -> None:
            picture = left.pop(place)
            # At equal need train comes first.
            part = max(("train", "val"), key=lambda name: (need[name], total[name]))
            parts[part].append(picture)
            total[part] -= 1
            for name in picture.label:
                wanted[name][part] -= 1

        while any(x.label for x in left.values()):
            remaining = Counter(name for x in left.values() for name in x.label)
            rarest = min(remaining, key=lambda name: (remaining[name], natural_order(name)))
            for place in [i for i, x in left.items() if rarest in x.label]:
                give(place, wanted[rarest])
        for place in list(left):
            give(place, total)
        return parts["train"], parts["val"]

    def faults(self, train: PictureSet) -> list[str]:
        everywhere = [name for name, n in train.counts().items() if n == len(train)]
        if not everywhere:
            return []
        return [
            f"all {len(train)} training pictures have the label {some(everywhere)}; expected "
            "some without it. Leave it out: no picture shows what its absence looks like."
        ]

    # -- numbers -------------------------------------------------------------------------

    def label(self, target: Any, names: Sequence[str]) -> tuple[float, ...]:
        return tuple(float(name in target) for name in names)

    def array(self, labels: Sequence[Any]) -> np.ndarray:
        return np.array(labels, np.float32)

    def text(self, label: Any, names: Sequence[str]) -> str:
        return ", ".join(_having(label, names)) or "no label"

    def counts(self, pictures: PictureSet) -> dict[str, int]:
        sums = pictures.array().sum(0, dtype=np.int64)
        return {name: int(number) for name, number in zip(pictures.labels, sums)}

    def cells(self, label: Any, names: Sequence[str]) -> dict[str, str]:
        return {name: f"{value:.0f}" for name, value in zip(names, label)}


def _having(label: Iterable[float], names: Sequence[str]) -> list[str]:
    return [name for name, value in zip(names, label) if value]


def _cells(
    listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
) -> list[Any]:
    """The labels in one cell of each row."""
    (column,) = columns
    found = []
    for row in rows:
        names = (name.strip() for name in _SEPARATORS.split(row.cells[column]))
        found.append(tuple(sorted({name for name in names if name}, key=natural_order)))
    empty = [str(row.line) for row, names in zip(rows, found) if not names]
    if empty:
        listing.warning(
            f"{path}: {count(len(empty), 'row')} without labels: line {some(empty)}. These "
            "pictures count as examples without any of the labels."
        )
    if found and max(map(len, found)) < 2:
        listing.warning(
            f"{path}: no picture has more than one label in the column {column}; labels are "
            "separated by | or ; or commas. For one class each, use the task classification."
        )
    return found


def _columns(
    listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
) -> list[Any]:
    """The labels whose column says yes."""

    def yes_or_no(cell: str) -> bool:
        return _YES_OR_NO[cell.lower()]

    values = bad_cells(listing, path, columns, rows, yes_or_no, "1 or 0")
    return [
        None if row is None else tuple(name for name, yes in zip(columns, row) if yes)
        for row in values
    ]


def _merged(listing: Listing, path: Path, part: Sequence[FoundPicture]) -> list[FoundPicture]:
    """The pictures in class folders, each once, with the names of all its folders."""
    sizes = Counter(os.path.getsize(x.path) for x in part)
    groups: dict[object, list[FoundPicture]] = defaultdict(list)
    for x in part:
        alone = sizes[os.path.getsize(x.path)] == 1
        groups[x.path if alone else _digest(x.path)].append(x)
    merged = []
    for group in groups.values():
        first = min(group)
        labels = sorted({x.label.strip() for x in group}, key=natural_order)
        merged.append(FoundPicture(first.name, first.path, tuple(labels)))
    if len(merged) == len(part) and part:
        listing.warning(
            f"{path}: no picture is in more than one class folder, so each has one label. For "
            "one class each, use the task classification."
        )
    return merged


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()
