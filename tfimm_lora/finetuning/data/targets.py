"""``Targets``: what pictures are labelled with, and how it is read, divided and counted."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from tfimm_lora.finetuning.data.findings import Finding, Problem, count, some
from tfimm_lora.finetuning.data.folders import list_folder
from tfimm_lora.finetuning.data.listing import FoundPicture, Listing

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.dataset import PictureSet, Split

_T = TypeVar("_T")

#: Columns of a CSV file that are never targets.
PATH, SPLIT = "path", "split"


class Row(NamedTuple):
    """A row of a CSV file: the number of its line, and its cells by column."""

    line: int
    cells: dict[str, str]


class Targets(ABC):
    """What pictures are labelled with, and how it is read, divided and counted.

    A target passes through three forms: cells of a CSV file or the name of a folder; the target
    of a ``FoundPicture``, with names; and ``Picture.label``, with numbers only, in the order of
    the outputs of the model. For targets that are pictures, ``Picture.label`` is the path of a
    file.

    Attributes:
        noun, nouns: What an output of the model stands for, in messages.
        is_exclusive: Whether a picture has exactly one of the outputs as its target.
        may_be_empty: Whether cells with targets may be empty; ``read`` reports them then.
        alike_agree: Whether pictures that look alike should have the same target.
        are_pictures: Whether a target is a picture itself, a file that ``picture`` reads.
    """

    noun: ClassVar[str]
    nouns: ClassVar[str]
    is_exclusive: ClassVar[bool] = False
    may_be_empty: ClassVar[bool] = True
    alike_agree: ClassVar[bool] = True
    are_pictures: ClassVar[bool] = False

    # -- reading -------------------------------------------------------------------------

    @property
    @abstractmethod
    def header(self) -> str:
        """The columns of a CSV file, in messages."""

    @property
    def sources(self) -> str:
        """What labelled pictures may be given as, in messages."""
        return (
            "a folder of class folders, a folder with train/ and val/, or a CSV file with "
            f"{self.header}"
        )

    @abstractmethod
    def columns(self, header: Sequence[str]) -> tuple[str, ...]:
        """The columns of a CSV file with targets; none if the file does not have them."""

    @abstractmethod
    def read(
        self, listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
    ) -> list[Any]:
        """The target of each row; None after recording why it cannot be used."""

    def listed(self, path: Path) -> Listing:
        """The pictures in a folder, with their targets."""
        listing = list_folder(path)
        self.of_folder(listing, path)
        return listing

    @abstractmethod
    def of_folder(self, listing: Listing, path: Path) -> None:
        """Turn the names of class folders, the targets in a listing, into targets."""

    @abstractmethod
    def names(self, listing: Listing, path: str) -> tuple[str, ...]:
        """What the outputs stand for, in their order; none after recording why not."""

    def resolved(self, listing: Listing) -> Targets:
        """These targets, with what the listed pictures say of them."""
        return self

    # -- parts ---------------------------------------------------------------------------

    @abstractmethod
    def names_in(self, target: Any) -> tuple[str, ...]:
        """The names that a target has."""

    @abstractmethod
    def divided(
        self, found: Sequence[FoundPicture], validation: float, seed: int
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Divide pictures into train and val."""

    def inspect(
        self, parts: Mapping[str, PictureSet], sizes: Mapping[str, tuple[int, int]]
    ) -> tuple[list[Problem], list[Finding]]:
        """Read the files of targets that are pictures, and return what is wrong with them.

        Args:
            parts: The pictures.
            sizes: The height and width of each picture that can be read.

        Returns:
            The pictures to leave out, and the errors and warnings.
        """
        return [], []

    def faults(self, train: PictureSet) -> list[str]:
        """Why a model cannot be trained on these pictures."""
        return []

    # -- numbers -------------------------------------------------------------------------

    @abstractmethod
    def label(self, target: Any, names: Sequence[str]) -> Any:
        """``Picture.label`` for a target."""

    @abstractmethod
    def array(self, labels: Sequence[Any]) -> np.ndarray:
        """The labels of pictures as one array, for batches."""

    def picture(self, label: Any, names: Sequence[str]) -> np.ndarray:
        """The target of a picture that is a picture itself, int32 (height, width).

        Raises:
            UnreadablePicture: if it cannot be read.
        """
        raise TypeError(f"{type(self).__name__} are no pictures.")

    def identity(self, label: Any) -> Any:
        """What two labels have in common if they are the same, also in two files."""
        return label

    @abstractmethod
    def text(self, label: Any, names: Sequence[str]) -> str:
        """A label in words."""

    @abstractmethod
    def counts(self, pictures: PictureSet) -> dict[str, int]:
        """The number of pictures of each output, in the order of the outputs."""

    @abstractmethod
    def cells(self, label: Any, names: Sequence[str]) -> dict[str, str]:
        """The cells of a CSV file, by column, that ``read`` reads as this label."""

    def table(self, split: Split, left_out: Counter[str]) -> tuple[list[str], list[list[str]]]:
        """A table about a split: its header, and a row for each output and one for all.

        ``left_out`` is the number of pictures that cannot be used, by the text of their label.
        """
        parts = {name: part.counts() for name, part in split.parts().items()}
        rows = [
            [name, *(f"{numbers[name]}" for numbers in parts.values())] for name in split.labels
        ]
        totals = [str(len(part)) for part in split.parts().values()]
        rows.append(["all", *totals])
        header = [self.noun, *parts]
        if self.is_exclusive:
            header.append("left out")
            for row in rows[:-1]:
                row.append(str(left_out[row[0]]))
            rows[-1].append(str(left_out.total()))
        return header, rows


# -- what several kinds of targets share ----------------------------------------------------


def hash_order(seed: int) -> Callable[[FoundPicture], tuple[bytes, FoundPicture]]:
    """A key that sorts pictures at random, by nothing but the seed and their names."""

    def order(x: FoundPicture) -> tuple[bytes, FoundPicture]:
        # File systems store accented letters differently, as one character or as two.
        name = unicodedata.normalize("NFC", x.name)
        digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape"))
        return digest.digest(), x

    return order


def validation_count(n: int, validation: float) -> int:
    """The number of n pictures that go to validation: at least one, and never all."""
    share = int(n * validation + 0.5)
    return max(min(share, n - 1), min(1, n - 1))


def other_columns(header: Sequence[str]) -> tuple[str, ...]:
    """The columns of a CSV file except path and split."""
    return tuple(name for name in header if name and name not in (PATH, SPLIT))


def bad_cells(
    listing: Listing,
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Row],
    parse: Callable[[str], _T],
    expected: str,
) -> list[list[_T] | None]:
    """Parse the cells of some columns, and record one error for each column with bad ones.

    Args:
        listing, path: Where to record, and the file.
        columns, rows: The columns and all rows.
        parse: Returns the value of a cell without spaces around it, or raises a ValueError or
            KeyError.
        expected: What it expects, in words.

    Returns:
        The values of each row; None for a row with a bad cell.
    """
    values: list[list[_T] | None] = [[] for _ in rows]
    for column in columns:
        empty: list[tuple[int, str]] = []
        bad: list[tuple[int, str]] = []
        for i, row in enumerate(rows):
            cell, known = row.cells[column].strip(), values[i]
            try:
                value = parse(cell)
            except (ValueError, KeyError):
                values[i] = None
                (bad if cell else empty).append((row.line, cell))
            else:
                if known is not None:
                    known.append(value)
        for kind, cells in (("empty", empty), ("bad", bad)):
            if cells:
                _record_bad(listing, path, column, kind, cells, len(rows), expected)
    return values


def _record_bad(
    listing: Listing,
    path: Path,
    column: str,
    kind: str,
    cells: Sequence[tuple[int, str]],
    rows: int,
    expected: str,
) -> None:
    lines = some([str(line) for line, _ in cells])
    if kind == "empty":
        what = f"is empty in {count(len(cells), 'row')} (line {lines})"
    else:
        given = some([repr(cell) for cell in dict.fromkeys(cell for _, cell in cells)], 3)
        what = f"has {given} (line {lines})"
    advice = ""
    if len(cells) == rows:
        advice = " If it is no target, name the columns that are: --columns (columns=)."
    elif any(re.fullmatch(r"-?\d+,\d+", cell) for _, cell in cells):
        advice = " Write decimals with a point."
    listing.error(
        f"{path}: the column {column} {what}; expected {expected} in every row.{advice}",
        [f"{path}, line {line}" for line, _ in cells],
    )


def warn_of_alike(listing: Listing, path: str, names: Iterable[str], nouns: str) -> None:
    """Warn of names that differ only in case or spaces."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folded = unicodedata.normalize("NFC", name).casefold()
        alike["".join(folded.split())].append(name)
    for same in alike.values():
        if len(same) > 1:
            listing.warning(
                f"{path}: the labels {', '.join(map(repr, same))} differ only in case or "
                f"spaces; they are treated as different {nouns}."
            )
