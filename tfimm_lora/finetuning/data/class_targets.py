"""``ClassTargets``: each picture belongs to one class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.data.findings import ERROR, count
from tfimm_lora.finetuning.data.listing import FoundPicture, Listing
from tfimm_lora.finetuning.data.picture_files import natural_order
from tfimm_lora.finetuning.data.targets import (
    Row,
    Targets,
    hash_order,
    validation_count,
    warn_of_alike,
)

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.dataset import PictureSet

_LABEL = "label"


@dataclass(frozen=True)
class ClassTargets(Targets):
    """One class for each picture. ``Picture.label`` is the index of the class."""

    noun: ClassVar[str] = "class"
    nouns: ClassVar[str] = "classes"
    is_exclusive: ClassVar[bool] = True
    may_be_empty: ClassVar[bool] = False

    @property
    def header(self) -> str:
        return "path,label"

    def columns(self, header: Sequence[str]) -> tuple[str, ...]:
        return (_LABEL,) if _LABEL in header else ()

    def read(
        self, listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
    ) -> list[Any]:
        given = [row.cells[_LABEL] for row in rows]
        spaces = sum(text != text.strip() for text in given)
        if spaces:
            listing.warning(
                f"{path}: removed the spaces around the labels of {count(spaces, 'row')}."
            )
        return [text.strip() for text in given]

    def of_folder(self, listing: Listing, path: Path) -> None:
        """The name of the folder is the class."""

    def names(self, listing: Listing, path: str) -> tuple[str, ...]:
        found = [x for part in listing.parts.values() for x in part]
        labels = tuple(sorted({x.label for x in found}, key=natural_order))
        if not found and any(x.level == ERROR for x in listing.findings):
            return ()  # for a reason that is recorded
        if len(labels) < 2:
            listing.error(
                f"{path} has pictures of "
                f"{'one class, ' + labels[0] if labels else 'no class'}; expected at least two "
                "classes."
            )
            return ()
        warn_of_alike(listing, path, labels, self.nouns)
        return labels

    def names_in(self, target: Any) -> tuple[str, ...]:
        return (target,)

    def divided(
        self, found: Sequence[FoundPicture], validation: float, seed: int
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Sort each class by the hashes of its names; the first pictures go to val."""
        by_label: dict[str, list[FoundPicture]] = defaultdict(list)
        for x in found:
            by_label[x.label].append(x)
        train: list[FoundPicture] = []
        val: list[FoundPicture] = []
        for pictures in by_label.values():
            number = validation_count(len(pictures), validation)
            pictures = sorted(pictures, key=hash_order(seed))
            val += pictures[:number]
            train += pictures[number:]
        return train, val

    def label(self, target: Any, names: Sequence[str]) -> int:
        return names.index(target)

    def array(self, labels: Sequence[Any]) -> np.ndarray:
        return np.array(labels, np.int32)

    def text(self, label: Any, names: Sequence[str]) -> str:
        name: str = names[label]
        return name

    def counts(self, pictures: PictureSet) -> dict[str, int]:
        found = Counter(picture.label for picture in pictures.pictures)
        return {label: found[i] for i, label in enumerate(pictures.labels)}

    def cells(self, label: Any, names: Sequence[str]) -> dict[str, str]:
        return {_LABEL: names[label]}


#: The targets of a classification, which is what pictures have unless stated otherwise.
CLASSES = ClassTargets()
