"""Listing of labelled pictures in class folders and CSV files, with or without a split."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

#: The suffixes of picture files in folders, in lower case.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm"),
)

#: The names of the parts of a split.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class FoundPicture(NamedTuple):
    """A picture with the name of its label. It is sorted and split by ``name``."""

    name: str
    path: str
    label: str


#: The pictures of "train" and "val", or all pictures with the key "" if they are not split.
Parts = dict[str, list[FoundPicture]]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """A sort key that compares numbers in names by value: "2" before "10".

    Example:
        >>> from tfimm_lora.finetuning.data.folders import natural_order
        >>> sorted(["b", "a10", "A2"], key=natural_order)
        ['A2', 'a10', 'b']
    """
    pieces = re.split(r"(\d+)", name.casefold())
    return [int(x) if i % 2 else x for i, x in enumerate(pieces)], name


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and the number of the others.

    Example:
        >>> from tfimm_lora.finetuning.data.folders import some
        >>> some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- folders --------------------------------------------------------------------------------


def in_folder(folder: Path) -> Parts:
    """The pictures in a folder of class folders, or in train/ and val/ with class folders."""
    inside = _folders(folder)
    known = [name for name in inside if name.lower() in _PARTS]
    part = {_PARTS[name.lower()]: name for name in reversed(known)}
    train, val = part.get("train"), part.get("val", part.get("test"))
    if train is not None and val is not None:
        beside = _pictures(folder)
        if beside:
            warnings.warn(
                f"{folder}: ignored pictures beside {train}/ and {val}/: {some(beside)}.",
                stacklevel=3,
            )
        return {
            "train": _in_class_folders(folder / train),
            "val": _in_class_folders(folder / val),
        }
    # Otherwise "train" is a class (beside "bus" and "car"), unless it is the only folder.
    if train is not None and inside == [train] and _folders(folder / train):
        raise ValueError(
            f"{folder} has {train}/ but no validation pictures; expected val/, valid/, "
            "validation/ or test/ beside it. To split the pictures at random, pass "
            f"{str(folder / train)!r}."
        )
    return {"": _in_class_folders(folder)}


def _in_class_folders(folder: Path) -> list[FoundPicture]:
    labels, beside = _folders(folder), _pictures(folder)
    if not labels:
        raise ValueError(
            f"{folder} has no class folders{', only pictures' if beside else ''}; expected a "
            "folder of pictures for each class, with the name of the class."
        )
    if beside:
        raise ValueError(
            f"{folder} has pictures beside its class folders: {some(beside)}; expected each in "
            "the folder of its class. Move them there, or remove them."
        )
    found, empty = [], []
    ignored: Counter[str] = Counter()
    above = (os.path.realpath(folder),)
    for label in labels:
        names = sorted(_walk(folder / label, label, above, ignored))
        if not names:
            empty.append(label)
        found += [FoundPicture(name, str(folder / name), label) for name in names]
    if empty:
        raise ValueError(
            f"{folder} has class folders without pictures: {some(empty)}; expected files with "
            f"the suffix {', '.join(EXTENSIONS)}. Add pictures, or remove the folders."
        )
    if ignored:
        listed = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
        warnings.warn(
            f"{folder}: ignored files without the suffix of a picture: {listed}.",
            stacklevel=4,
        )
    return found


def _walk(
    folder: Path, name: str, above: Sequence[str], ignored: Counter[str]
) -> Iterator[str]:
    """The names of the pictures in a folder and its subfolders. Cyclic links are skipped."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _entries(folder):
        inside = f"{name}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(folder / entry.name, inside, (*above, real), ignored)
        elif _is_picture(entry):
            yield inside
        else:
            ignored[os.path.splitext(entry.name)[1].lower() or "without extension"] += 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, without hidden files and the archive metadata of macOS."""
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]


def _folders(folder: Path) -> list[str]:
    return sorted((e.name for e in _entries(folder) if _is_folder(e)), key=natural_order)


def _pictures(folder: Path) -> list[str]:
    entries = _entries(folder)
    return sorted(e.name for e in entries if _is_picture(e) and not _is_folder(e))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(EXTENSIONS)


# -- CSV ------------------------------------------------------------------------------------


def in_csv(path: Path) -> Parts:
    """The pictures that a CSV file lists, with or without a split."""
    header, rows = _rows(path)
    if not {"path", "label"} <= set(header):
        raise ValueError(
            f"{path} has the columns {', '.join(header) or '(none)'}; expected a first line "
            "with path,label (and optionally split), separated by commas."
        )
    parts: Parts = defaultdict(list)
    for line, row in rows:
        file, label = row.get("path"), row.get("label")
        if not file or not label:
            raise ValueError(
                f"{path}, line {line}: received {row}; expected a path and a label."
            )
        part = _part(path, line, row) if "split" in header else ""
        parts[part].append(_listed(path.parent, file, label))
    missing = [x.name for part in parts.values() for x in part if not os.path.isfile(x.path)]
    if missing:
        raise FileNotFoundError(
            f"{path} lists {len(missing)} files that do not exist: {some(missing)}; expected "
            f"absolute paths, or paths relative to {path.parent}."
        )
    if "split" not in header:
        return parts
    return {"train": parts["train"], "val": parts["val"] or parts["test"]}


def _rows(path: Path) -> tuple[list[str], Iterable[tuple[int, dict[str, str]]]]:
    """The header in lower case, and each non-empty line with its number.

    File names may be any bytes, which Python keeps as surrogates; everything else is UTF-8.
    """
    try:
        # utf-8-sig: spreadsheet programs write a byte order mark.
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, line) for line in reader if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    header = [name.strip().lower() for name in lines[0][1]] if lines else []
    rows = [(number, dict(zip(header, line))) for number, line in lines[1:]]
    texts = [*header, *(row[name] for _, row in rows for name in row if name != "path")]
    if any("\udc80" <= letter <= "\udcff" for text in texts for letter in text):
        raise ValueError(f"{path} is not a CSV file in UTF-8.")
    return header, rows


def _part(path: Path, line: int, row: dict[str, str]) -> str:
    given = row.get("split", "")
    part = _PARTS.get(given.strip().lower())
    if part is None:
        raise ValueError(
            f"{path}, line {line}: split is {given!r}; expected one of {', '.join(_PARTS)}. "
            "Leave the column out to split at random."
        )
    return part


def _listed(folder: Path, file: str, label: str) -> FoundPicture:
    path = os.path.normpath(folder / file)
    return FoundPicture(Path(os.path.relpath(path, folder)).as_posix(), path, label)
