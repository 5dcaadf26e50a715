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
    """Training and validation pictures, with the same labels."""

    train: PictureSet
    val: PictureSet
    labels: tuple[str, ...]


def find_pictures(
    data: str | os.PathLike[str], *, validation: float = 0.2, seed: int = 0
) -> Split:
    """Find labelled pictures and split them into train and val.

    ``data`` is one of

    * a folder with ``train/`` and ``val/``, both with class folders. ``val`` may also be called
      ``valid`` or ``validation``. A folder ``test`` is ignored, unless there is no other
      folder for validation.
    * a folder of class folders. Each class is split at random.
    * a CSV file with the columns ``path`` and ``label``. Paths are absolute, or relative to the
      folder of the file. A third column, ``split``, contains one of the names above; without it
      each class is split at random.

    Subfolders of a class folder are searched too. Pictures are recognized by their suffix, see
    ``folders.EXTENSIONS``; hidden files are ignored. Links are followed. Labels are sorted
    naturally, "2" before "10".

    Args:
        data: The folder or CSV file.
        validation: The share of each class for validation, if the data are not split already:
            at least one picture, and never all of them.
        seed: The seed of the split. The split depends only on the seed and the names of the
            pictures within ``data``: it is the same on every machine, and adding a picture
            changes the part of few others.

    Returns:
        A ``Split`` with ``.train``, ``.val`` and ``.labels``. The pictures are sorted by name.

    Raises:
        FileNotFoundError: if the folder, the CSV file or pictures in it do not exist.
        ValueError: if there are no pictures, fewer than two classes, a class folder without
            pictures, pictures beside the class folders, a file that occurs twice, classes in
            val that are not in train, or a CSV file without the columns.

    Warns:
        UserWarning: about labels that differ only in case or spaces, classes without validation
            pictures, and files that are ignored because of their suffix.

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
            f"{path} has no validation pictures of these classes: {some(unseen)}. The model "
            "cannot be evaluated on them.",
            stacklevel=2,
        )
    return Split(_numbered(train, labels), _numbered(val, labels), labels)


def _numbered(part: Iterable[FoundPicture], labels: tuple[str, ...]) -> PictureSet:
    number = {label: i for i, label in enumerate(labels)}
    return PictureSet(tuple(Picture(x.path, number[x.label]) for x in sorted(part)), labels)


def _labels(found: Iterable[FoundPicture], path: Path) -> tuple[str, ...]:
    """The sorted labels: at least two, with a warning about labels that hardly differ."""
    labels = tuple(sorted({x.label for x in found}, key=natural_order))
    if len(labels) < 2:
        raise ValueError(
            f"{path} has pictures of {'one class, ' + labels[0] if labels else 'no class'}; "
            "expected at least two classes."
        )
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        folded = unicodedata.normalize("NFC", label).casefold()
        alike["".join(folded.split())].append(label)
    for names in alike.values():
        if len(names) > 1:
            warnings.warn(
                f"{path}: the labels {', '.join(map(repr, names))} differ only in case or "
                "spaces; they are treated as different classes.",
                stacklevel=3,
            )
    return labels


def _check_once(found: Iterable[FoundPicture]) -> None:
    """Raise for a file that occurs twice: in train and val, or with two labels."""
    seen: dict[str, str] = {}
    twice = []
    for x in found:
        real = os.path.realpath(x.path)
        if real in seen:
            twice.append(f"{seen[real]} = {x.path}")
        seen[real] = x.path
    if twice:
        raise ValueError(
            f"{len(twice)} files occur twice, by name or through links: {some(twice)}; "
            "expected each file once, in one class, in train or in val."
        )


def _check_given(train: list[FoundPicture], val: list[FoundPicture], path: Path) -> None:
    for name, part in (("train", train), ("val", val)):
        if not part:
            raise ValueError(
                f"{path} has no pictures in {name}; expected at least one. Leave the split out "
                "to split at random."
            )
    seen = {x.label for x in train}
    unknown = sorted({x.label for x in val} - seen, key=natural_order)
    if unknown:
        raise ValueError(
            f"{path} has classes in val that are not in train: {some(unknown)}; expected the "
            f"classes of train: {some(sorted(seen, key=natural_order))}."
        )


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
