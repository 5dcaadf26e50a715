"""``find_pictures``: labelled pictures in class folders or a CSV file, split for training.

Nothing is decoded here; see ``pictures.check_pictures``.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tfimm_lora.finetuning.data.csv_files import list_csv
from tfimm_lora.finetuning.data.findings import ERROR, Finding, count, raise_errors, some, warn
from tfimm_lora.finetuning.data.folders import list_folder
from tfimm_lora.finetuning.data.listing import UNSPLIT, FoundPicture, Listing
from tfimm_lora.finetuning.data.picture_files import natural_order
from tfimm_lora.validation import check_number


@dataclass(frozen=True)
class Picture:
    """A picture file and the index of its label."""

    path: str
    label: int


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures. ``labels[picture.label]`` is the name of the label of a picture."""

    pictures: tuple[Picture, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def counts(self) -> dict[str, int]:
        """The number of pictures of each label, in the order of the labels."""
        found = Counter(picture.label for picture in self.pictures)
        return {label: found[i] for i, label in enumerate(self.labels)}


@dataclass(frozen=True)
class Split:
    """Training and validation pictures, with the same labels, and test pictures if there are
    some."""

    train: PictureSet
    val: PictureSet
    labels: tuple[str, ...]
    test: PictureSet | None = None

    def parts(self) -> dict[str, PictureSet]:
        """The parts that there are, by name: "train", "val" and, if there is one, "test"."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def __len__(self) -> int:
        return sum(map(len, self.parts().values()))


def find_pictures(
    data: str | os.PathLike[str], *, validation: float = 0.2, seed: int = 0
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
    split, findings = list_split(data, validation=validation, seed=seed)
    raise_errors(findings)
    warn(findings, stacklevel=2)
    assert split is not None
    return split


def list_split(
    data: str | os.PathLike[str], *, validation: float = 0.2, seed: int = 0
) -> tuple[Split | None, list[Finding]]:
    """As ``find_pictures``, but return what was found instead of raising and warning.

    Returns:
        The pictures without those that an error concerns, or None if they cannot be used for
        training; and the errors and warnings.
    """
    check_number(validation, "validation", 0, exclusive=True, below=1)
    if not isinstance(data, (str, os.PathLike)):
        raise TypeError(f"Received data={data!r}; expected the path of a folder or CSV file.")
    listing = list_pictures(data)
    path = os.path.abspath(data)
    parts = listing.parts
    _drop_repeated(listing)
    labels = _labels(listing, path)
    if not labels:
        return None, listing.findings
    if UNSPLIT in parts:
        train, val = _divided(parts[UNSPLIT], validation, seed)
    else:
        train, val = parts.get("train", []), parts.get("val", [])
    test = parts.get("test")
    if not _check_parts(listing, path, train, val, is_split=UNSPLIT not in parts):
        return None, listing.findings
    seen = {x.label for x in train}
    labels = tuple(label for label in labels if label in seen)
    others = {"val": val, "test": test or []}
    known = {name: _known(listing, path, name, part, labels) for name, part in others.items()}
    unseen = [label for label in labels if label not in {x.label for x in known["val"]}]
    if unseen:
        listing.warning(
            f"{path} has no validation pictures of these classes: {some(unseen)}. The model "
            "cannot be evaluated on them."
        )
    return (
        Split(
            _numbered(train, labels),
            _numbered(known["val"], labels),
            labels,
            None if test is None else _numbered(known["test"], labels),
        ),
        listing.findings,
    )


def list_pictures(data: str | os.PathLike[str]) -> Listing:
    """List the pictures in a folder or CSV file."""
    path = Path(os.path.abspath(data))
    if path.is_dir():
        return list_folder(path)
    expected = (
        "a folder of class folders, a folder with train/ and val/, or a CSV file with "
        "path,label"
    )
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
        listing = list_csv(path)
    return listing


def _numbered(part: Iterable[FoundPicture], labels: tuple[str, ...]) -> PictureSet:
    number = {label: i for i, label in enumerate(labels)}
    return PictureSet(tuple(Picture(x.path, number[x.label]) for x in sorted(part)), labels)


def _labels(listing: Listing, path: str) -> tuple[str, ...]:
    """The sorted labels, or none after an error if there are fewer than two."""
    found = [x for part in listing.parts.values() for x in part]
    labels = tuple(sorted({x.label for x in found}, key=natural_order))
    if not found and any(x.level == ERROR for x in listing.findings):
        return ()  # for a reason that is recorded
    if len(labels) < 2:
        listing.error(
            f"{path} has pictures of {'one class, ' + labels[0] if labels else 'no class'}; "
            "expected at least two classes."
        )
        return ()
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        folded = unicodedata.normalize("NFC", label).casefold()
        alike["".join(folded.split())].append(label)
    for names in alike.values():
        if len(names) > 1:
            listing.warning(
                f"{path}: the labels {', '.join(map(repr, names))} differ only in case or "
                "spaces; they are treated as different classes."
            )
    return labels


def _drop_repeated(listing: Listing) -> None:
    """Record files that occur twice, in one part or two, with one label or two. Drop them."""
    places: dict[str, list[tuple[str, FoundPicture]]] = defaultdict(list)
    for name, part in listing.parts.items():
        for x in part:
            places[os.path.realpath(x.path)].append((name, x))
    repeated = [given for given in places.values() if len(given) > 1]
    if not repeated:
        return
    twice = [" = ".join(x.path for _, x in given) for given in repeated]
    listing.error(
        f"{count(len(twice), 'file occurs', 'files occur')} twice, by name or through links: "
        f"{some(twice)}; expected each file once, in one class, in one part.",
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
    is_split: bool,
) -> bool:
    """Whether there are pictures to train on and for validation, which an error denies."""
    empty = [name for name, part in (("train", train), ("val", val)) if not part]
    if empty and is_split:
        listing.error(
            f"{path} has no pictures in {' and '.join(empty)}; expected at least one. To split "
            "at random, leave the split out."
        )
    elif empty:
        listing.error(
            f"{path} has one picture in each class; expected at least two in some class, one "
            "of them for validation."
        )
    elif len({x.label for x in train}) < 2:
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
) -> list[FoundPicture]:
    """The pictures of a part whose class is in train. Others are an error."""
    unknown = [x for x in part if x.label not in labels]
    if unknown:
        classes = sorted({x.label for x in unknown}, key=natural_order)
        listing.error(
            f"{path} has classes in {name} that are not in train: {some(classes)}; expected "
            f"the classes of train: {some(labels)}.",
            [x.path for x in unknown],
        )
    return [x for x in part if x.label in labels]


def _divided(
    found: Iterable[FoundPicture], validation: float, seed: int
) -> tuple[list[FoundPicture], list[FoundPicture]]:
    """Sort each class by the hashes of its names; the first pictures go to val."""
    by_label: dict[str, list[FoundPicture]] = defaultdict(list)
    for x in found:
        by_label[x.label].append(x)

    def order(x: FoundPicture) -> tuple[bytes, FoundPicture]:
        # File systems store accented letters differently, as one character or as two.
        name = unicodedata.normalize("NFC", x.name)
        digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape"))
        return digest.digest(), x

    train: list[FoundPicture] = []
    val: list[FoundPicture] = []
    for pictures in by_label.values():
        n = len(pictures)
        share = math.floor(n * validation + 0.5)
        count = max(min(share, n - 1), min(1, n - 1))
        pictures = sorted(pictures, key=order)
        val += pictures[:count]
        train += pictures[count:]
    return train, val
