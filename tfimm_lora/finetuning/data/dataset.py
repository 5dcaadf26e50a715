"""``find_pictures``: labelled pictures in class folders or a CSV file, split for training.

Nothing is decoded here; see ``pictures.check_pictures``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.class_targets import CLASSES
from tfimm_lora.finetuning.data.csv_files import list_csv
from tfimm_lora.finetuning.data.findings import Finding, count, raise_errors, some, warn
from tfimm_lora.finetuning.data.listing import UNSPLIT, FoundPicture, Listing
from tfimm_lora.finetuning.data.picture_files import natural_order
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.validation import check_number


@dataclass(frozen=True)
class Picture:
    """A picture file and its target.

    Attributes:
        path: The file.
        label: The index of its class. With several labels, a number for each label: 1.0 if the
            picture has it, else 0.0. In a regression, its numbers. In a segmentation, the file
            of its mask.
    """

    path: str
    label: Any


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures.

    Attributes:
        pictures: The pictures.
        labels: The names of the classes, of the labels, or of the numbers of a regression.
        targets: What the pictures are labelled with. Default: each with one class, so that
            ``labels[picture.label]`` is its name.
    """

    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]
    targets: Targets = CLASSES

    def __len__(self) -> int:
        return len(self.pictures)

    def counts(self) -> dict[str, int]:
        """The number of pictures of each label, in the order of the labels."""
        return self.targets.counts(self)

    def array(self) -> np.ndarray:
        """The labels of all pictures: int32 (n,) for classes, else float32 (n, labels)."""
        return self.targets.array([picture.label for picture in self.pictures])

    def text(self, picture: Picture) -> str:
        """The label of a picture in words."""
        return self.targets.text(picture.label, self.labels)


@dataclass(frozen=True)
class Split:
    """Training and validation pictures, with the same labels, and test pictures if there are
    some."""

    train: PictureSet
    val: PictureSet
    labels: tuple[str, ...]
    test: PictureSet | None = None

    @property
    def targets(self) -> Targets:
        """What the pictures are labelled with."""
        return self.train.targets

    def parts(self) -> dict[str, PictureSet]:
        """The parts that there are, by name: "train", "val" and, if there is one, "test"."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def __len__(self) -> int:
        return sum(map(len, self.parts().values()))


def find_pictures(
    data: str | os.PathLike[str],
    *,
    validation: float = 0.2,
    seed: int = 0,
    targets: Targets = CLASSES,
) -> Split:
    """Find labelled pictures and split them into train and val.

    ``data`` is one of

    * a folder with ``train/``, ``val/`` and ``test/``, all with class folders. ``val`` may also
      be called ``valid`` or ``validation``. Without it, a share of ``train/`` is used for
      validation. ``test`` is optional.
    * a folder of class folders. Each class is split at random.
    * a CSV file with the columns ``path`` and ``label``, separated by commas, semicolons or
      tabs, in UTF-8 or UTF-16. Paths are absolute, or relative to the folder of the file. A
      third column, ``split``, contains one of the names above; without it each class is split
      at random.

    Test pictures are never used to train or to choose an epoch.

    Subfolders of a class folder are searched too. Pictures are recognized by their suffix, see
    ``picture_files.EXTENSIONS``, or by their first bytes if they have none; hidden files are
    ignored. Links are followed. Labels are sorted naturally, "2" before "10".

    Args:
        data: The folder or CSV file.
        validation: The share of each class for validation, if the data are not split already:
            at least one picture, and never all of them.
        seed: The seed of the split. The split depends only on the seed and the names of the
            pictures within ``data``: it is the same on every machine, and adding a picture
            changes the part of few others.
        targets: What the pictures are labelled with: ``MultiLabel.targets()``,
            ``Regression.targets()``, or by default each with one class. The columns of CSV
            files and the split are then as in docs/how-to/several-labels-and-numbers.md.

    Returns:
        A ``Split`` with ``.train``, ``.val``, ``.labels`` and ``.test`` (or None). The pictures
        are sorted by name.

    Raises:
        TypeError: if ``data`` is not a path or ``validation`` not a number.
        FileNotFoundError: if the folder, the CSV file or pictures in it do not exist.
        ValueError: if there are no pictures, fewer than two classes, a class folder without
            pictures, pictures beside the class folders, a file that occurs twice, classes in
            val or test that are not in train, or a CSV file without the columns or with rows
            that do not fit them. All faults are in one message.

    Warns:
        UserWarning: about labels that differ only in case or spaces, classes without validation
            pictures, and files, folders and columns that are ignored.

    Example:
        >>> import tempfile, pathlib
        >>> from tfimm_lora.finetuning.data.dataset import find_pictures
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     (folder / name).touch()
        >>> split = find_pictures(folder)
        >>> split.labels, split.val.counts()
        (('cat', 'dog'), {'cat': 1, 'dog': 1})
    """
    split, findings = list_split(data, validation=validation, seed=seed, targets=targets)
    raise_errors(findings)
    warn(findings, stacklevel=2)
    assert split is not None
    return split


def list_split(
    data: str | os.PathLike[str],
    *,
    validation: float = 0.2,
    seed: int = 0,
    targets: Targets = CLASSES,
) -> tuple[Split | None, list[Finding]]:
    """As ``find_pictures``, but return what was found instead of raising and warning.

    Returns:
        The pictures without those that an error concerns, or None if they cannot be used for
        training; and the errors and warnings.
    """
    check_number(validation, "validation", 0, exclusive=True, below=1)
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f"Received data={data!r}; expected the path of a folder or CSV file.")
    listing = list_pictures(data, targets)
    path = os.path.abspath(data)
    parts = listing.parts
    targets = targets.resolved(listing)
    _drop_repeated(listing, targets)
    labels = targets.names(listing, path)
    if not labels:
        return None, listing.findings
    if UNSPLIT in parts:
        train, val = targets.divided(parts[UNSPLIT], validation, seed)
    else:
        train, val = parts.get("train", []), parts.get("val", [])
    test = parts.get("test")
    if not _check_parts(listing, path, train, val, targets, is_split=UNSPLIT not in parts):
        return None, listing.findings
    if targets.are_pictures:
        return _split(labels, train, val, test, targets), listing.findings
    seen = _names_of(train, targets)
    everywhere = _names_of([*train, *val, *(test or [])], targets)
    nowhere = [label for label in labels if label not in everywhere]
    if nowhere:
        listing.error(
            f"{path} has no pictures with these {targets.nouns}: {some(nowhere)}; expected "
            "some with each. Remove the columns, or name the others: --columns (columns=)."
        )
    labels = tuple(label for label in labels if label in seen)
    others = {"val": val, "test": test or []}
    known = {
        name: _known(listing, path, name, part, labels, targets)
        for name, part in others.items()
    }
    in_val = _names_of(known["val"], targets)
    unseen = [label for label in labels if label not in in_val]
    if unseen:
        listing.warning(
            f"{path} has no validation pictures of these {targets.nouns}: {some(unseen)}. The "
            "model cannot be evaluated on them."
        )
    tested = None if test is None else known["test"]
    split = _split(labels, train, known["val"], tested, targets)
    for fault in targets.faults(split.train):
        listing.error(f"{path}: {fault}")
    return split, listing.findings


def _split(
    labels: tuple[str, ...],
    train: Iterable[FoundPicture],
    val: Iterable[FoundPicture],
    test: Iterable[FoundPicture] | None,
    targets: Targets,
) -> Split:
    return Split(
        _numbered(train, labels, targets),
        _numbered(val, labels, targets),
        labels,
        None if test is None else _numbered(test, labels, targets),
    )


def list_pictures(data: str | os.PathLike[str], targets: Targets = CLASSES) -> Listing:
    """List the pictures in a folder or CSV file, with their targets."""
    path = Path(os.path.abspath(data))
    if path.is_dir():
        return targets.listed(path)
    expected = targets.sources
    listing = Listing()
    if not path.exists():
        listing.error(
            f"Received data={str(data)!r}, which does not exist; expected {expected}.",
            cause=FileNotFoundError,
        )
    elif path.suffix.lower() not in (".csv", ".tsv", ".txt"):
        listing.error(
            f"Received data={str(data)!r}, a file whose name does not end in .csv; expected "
            f"{expected}."
        )
    else:
        listing = list_csv(path, targets)
    return listing


def _numbered(
    part: Iterable[FoundPicture], labels: tuple[str, ...], targets: Targets
) -> PictureSet:
    pictures = (Picture(x.path, targets.label(x.label, labels)) for x in sorted(part))
    return PictureSet(tuple(pictures), labels, targets)


def _names_of(part: Iterable[FoundPicture], targets: Targets) -> set[str]:
    """The names that the pictures of a part have."""
    return {name for x in part for name in targets.names_in(x.label)}


def _drop_repeated(listing: Listing, targets: Targets) -> None:
    """Record files that occur twice, in one part or two, with one label or two. Drop them."""
    places: dict[str, list[tuple[str, FoundPicture]]] = defaultdict(list)
    for name, part in listing.parts.items():
        for x in part:
            places[os.path.realpath(x.path)].append((name, x))
    repeated = [given for given in places.values() if len(given) > 1]
    if not repeated:
        return
    in_one = "in one class, " if targets.is_exclusive else ""
    twice = [" = ".join(x.path for _, x in given) for given in repeated]
    listing.error(
        f"{count(len(twice), 'file occurs', 'files occur')} twice, by name or through links: "
        f"{some(twice)}; expected each file once, {in_one}in one part.",
        [x.path for given in repeated for _, x in given],
    )
    dropped = {id(x) for given in repeated for _, x in given}
    for name, part in listing.parts.items():
        listing.parts[name] = [x for x in part if id(x) not in dropped]


def _check_parts(
    listing: Listing,
    path: str,
    train: list[FoundPicture],
    val: list[FoundPicture],
    targets: Targets,
    is_split: bool,
) -> bool:
    """Whether there are pictures to train on and for validation, which an error denies."""
    empty = [name for name, part in (("train", train), ("val", val)) if not part]
    if empty and is_split:
        listing.error(
            f"{path} has no pictures in {' and '.join(empty)}; expected at least one. To split "
            "at random, leave the split out."
        )
    elif empty and targets.is_exclusive:
        listing.error(
            f"{path} has one picture in each class; expected at least two in some class, one "
            "of them for validation."
        )
    elif empty:
        listing.error(
            f"{path} has {count(len(train) + len(val), 'picture')}, none of which can be used "
            f"for validation; expected at least two with the same {targets.noun}."
        )
    elif targets.is_exclusive and len(_names_of(train, targets)) < 2:
        listing.error(f"{path} has training pictures of one class; expected at least two.")
    else:
        return True
    return False


def _known(
    listing: Listing,
    path: str,
    name: str,
    part: list[FoundPicture],
    labels: tuple[str, ...],
    targets: Targets,
) -> list[FoundPicture]:
    """The pictures of a part whose class is in train. Others are an error."""
    new = _names_of(part, targets) - set(labels)
    unknown = [x for x in part if not new.isdisjoint(targets.names_in(x.label))]
    if unknown:
        listing.error(
            f"{path} has {targets.nouns} in {name} that are not in train: "
            f"{some(sorted(new, key=natural_order))}; expected the {targets.nouns} of train: "
            f"{some(labels)}.",
            [x.path for x in unknown],
        )
    return [x for x in part if new.isdisjoint(targets.names_in(x.label))]
