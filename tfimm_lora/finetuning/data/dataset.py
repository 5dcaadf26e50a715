"""``find_pictures``: labelled pictures in class folders or a CSV file, split for training.

Nothing is decoded here; see ``pictures.check_pictures``.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tfimm_lora.finetuning.data.folders import (
    FoundPicture,
    in_csv,
    in_folder,
    natural_order,
    some,
)


@dataclass(frozen=True)
class Picture:
    """A file and the number of its label."""

    path: str
    label: int


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures; ``labels[picture.label]`` is the name of a picture's label."""

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
    """Pictures to train on and pictures to validate on, with the same labels."""

    train: PictureSet
    val: PictureSet
    labels: tuple[str, ...]


def find_pictures(
    data: str | os.PathLike[str], *, validation: float = 0.2, seed: int = 0
) -> Split:
    """Find labelled pictures and split them into train and val.

    ``data`` is one of

    * a folder with ``train/`` and ``val/``, both of class folders. ``val`` may also be called
      ``valid`` or ``validation``. A folder ``test`` is left alone, for a test at the end,
      unless there is no other to validate on.
    * a folder of class folders, each of which is split here.
    * a CSV file with the columns ``path`` and ``label``; paths are absolute, or relative to the
      folder of the file. With a third column, ``split``, each line says its part in the words
      above; without it each class is split here.

    Folders inside a class folder are searched too. Pictures are known by the ends of their
    names, see ``finding.EXTENSIONS``; hidden files are left out. Links are followed. Labels are
    sorted as people count, "2" before "10".

    Args:
        data: The folder or CSV file.
        validation: The share of each class that goes to val where the split is made here;
            at least one picture, and never all.
        seed: Which pictures these are. The split depends on the seed and the names of the
            pictures within ``data`` only: it is the same on every machine, and a picture that
            is added moves few of the others.

    Returns:
        A ``Split`` with ``.train``, ``.val`` and ``.labels``. The pictures are sorted by name.

    Raises:
        FileNotFoundError: if the folder, the CSV file or pictures in it are missing.
        ValueError: if there are no pictures, fewer than two classes, a class folder without
            pictures, pictures beside the class folders, a file twice, classes in val that
            train has not, or a CSV file without the columns.

    Warns:
        UserWarning: of labels that differ only in case or spaces, of classes that val has not,
            and of files that are left out because their names are not those of pictures.

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
    if not 0 < validation < 1:
        raise ValueError(
            f"Received validation={validation}; expected a share between 0 and 1, for example "
            "0.2 for every fifth picture."
        )
    path = Path(os.path.abspath(data))
    if path.is_dir():
        parts = in_folder(path)
    elif not path.exists():
        raise FileNotFoundError(
            f"Received data={str(data)!r}, which does not exist; expected a folder of class "
            "folders, a folder with train/ and val/, or a CSV file with path,label."
        )
    elif path.suffix.lower() == ".csv":
        parts = in_csv(path)
    else:
        raise ValueError(
            f"Received data={str(data)!r}, a file whose name does not end in .csv; expected a "
            "folder of class folders, or a CSV file with path,label."
        )
    found = [x for part in parts.values() for x in part]
    labels = _labels(found, path)
    _check_once(found)
    if "" in parts:
        train, val = _divided(found, validation, seed)
    else:
        train, val = parts["train"], parts["val"]
        _check_given(train, val, path)
    unseen = sorted(set(labels) - {x.label for x in val}, key=natural_order)
    if unseen:
        warnings.warn(
            f"{path} has too few pictures to validate on of: {some(unseen)}. How well the "
            "model knows them will not be measured.",
            stacklevel=2,
        )
    return Split(_numbered(train, labels), _numbered(val, labels), labels)


def _numbered(part: Iterable[FoundPicture], labels: tuple[str, ...]) -> PictureSet:
    number = {label: i for i, label in enumerate(labels)}
    return PictureSet(tuple(Picture(x.path, number[x.label]) for x in sorted(part)), labels)


def _labels(found: Iterable[FoundPicture], path: Path) -> tuple[str, ...]:
    """The labels in order: at least two, with a warning where some hardly differ."""
    labels = tuple(sorted({x.label for x in found}, key=natural_order))
    if len(labels) < 2:
        raise ValueError(
            f"{path} has pictures of {'one class, ' + labels[0] if labels else 'no class'}; "
            "expected at least two classes to tell apart."
        )
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        folded = unicodedata.normalize("NFC", label).casefold()
        alike["".join(folded.split())].append(label)
    for names in alike.values():
        if len(names) > 1:
            warnings.warn(
                f"{path}: the labels {', '.join(map(repr, names))} differ only in case or "
                "spaces; they are taken for different classes.",
                stacklevel=3,
            )
    return labels


def _check_once(found: Iterable[FoundPicture]) -> None:
    """A file in both train and val would flatter; one with two labels would confuse."""
    seen: dict[str, str] = {}
    twice = []
    for x in found:
        real = os.path.realpath(x.path)
        if real in seen:
            twice.append(f"{seen[real]} = {x.path}")
        seen[real] = x.path
    if twice:
        raise ValueError(
            f"{len(twice)} files are there twice, by name or through links: {some(twice)}; "
            "expected each once, in one class, in train or in val."
        )


def _check_given(train: list[FoundPicture], val: list[FoundPicture], path: Path) -> None:
    for name, part in (("train", train), ("val", val)):
        if not part:
            raise ValueError(
                f"{path} has no pictures in {name}; expected some. Leave the split out to have "
                "it made."
            )
    seen = {x.label for x in train}
    unknown = sorted({x.label for x in val} - seen, key=natural_order)
    if unknown:
        raise ValueError(
            f"{path} has classes in val that train has not: {some(unknown)}; expected those of "
            f"train: {some(sorted(seen, key=natural_order))}."
        )


def _divided(
    found: Iterable[FoundPicture], validation: float, seed: int
) -> tuple[list[FoundPicture], list[FoundPicture]]:
    """Each class in an order that hashes of the names make, its beginning to val."""
    by_label: dict[str, list[FoundPicture]] = defaultdict(list)
    for x in found:
        by_label[x.label].append(x)

    def order(x: FoundPicture) -> tuple[bytes, FoundPicture]:
        # The same name, whether a file system keeps accents as letters of their own or not.
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
