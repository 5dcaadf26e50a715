"""``list_folder``: the pictures in class folders, with or without train/, val/ and test/."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tfimm_lora.finetuning.data.findings import count, some
from tfimm_lora.finetuning.data.listing import PARTS, UNSPLIT, FoundPicture, Listing
from tfimm_lora.finetuning.data.picture_files import (
    EXTENSIONS,
    is_hidden,
    is_picture,
    natural_order,
)


def list_folder(folder: Path) -> Listing:
    """List the pictures in class folders, or in train/, val/ and test/ with class folders.

    Without val/ the pictures of train/ are still to be split. "train" beside the folders of
    other classes is a class.
    """
    listing = Listing()
    inside = folders_in(folder)
    parts: dict[str, list[str]] = {}
    for name in inside:
        if name.lower() in PARTS:
            parts.setdefault(PARTS[name.lower()], []).append(name)
    only_parts = bool(inside) and sum(map(len, parts.values())) == len(inside)
    if "train" in parts and (len(parts) > 1 or (only_parts and _nested(folder, inside))):
        _list_parts(listing, folder, inside, parts)
    elif only_parts and _nested(folder, inside):
        listing.error(
            f"{folder} has {' and '.join(f'{x}/' for x in inside)} but no train/; expected "
            "train/ with the pictures to train on."
        )
    else:
        listing.parts[UNSPLIT] = _in_class_folders(listing, folder)
    return listing


def _list_parts(
    listing: Listing, folder: Path, inside: list[str], parts: dict[str, list[str]]
) -> None:
    for names in parts.values():
        if len(names) > 1:
            listing.error(
                f"{folder} has {' and '.join(f'{x}/' for x in names)}; expected one of them."
            )
    used = [names[0] for names in parts.values()]
    listed = " and ".join(f"{name}/" for name in used)
    others = [name for name in inside if name.lower() not in PARTS]
    if others:
        listing.warning(f"{folder}: ignored folders beside {listed}: {some(others)}.")
    beside = _pictures(folder)
    if beside:
        listing.warning(f"{folder}: ignored pictures beside {listed}: {some(beside)}.")
    if "val" not in parts:
        listing.warning(
            f"{folder} has no val/; pictures of {parts['train'][0]}/ are used for validation."
        )
    for part, names in parts.items():
        key = UNSPLIT if part == "train" and "val" not in parts else part
        listing.parts[key] = _in_class_folders(listing, folder / names[0])


def _nested(folder: Path, inside: Sequence[str]) -> bool:
    """Whether any of these folders has folders inside."""
    return any(folders_in(folder / name) for name in inside)


def _in_class_folders(listing: Listing, folder: Path) -> list[FoundPicture]:
    labels, beside = folders_in(folder), _pictures(folder)
    if not labels:
        listing.error(
            f"{folder} has no class folders{', only pictures' if beside else ''}; expected a "
            "folder of pictures for each class, with the name of the class."
            f"{csv_inside(folder)}",
            [str(folder / name) for name in beside],
        )
        return []
    if beside:
        listing.error(
            f"{folder} has {count(len(beside), 'picture')} beside its class folders: "
            f"{some(beside)}; expected each in the folder of its class. Move them there, or "
            "remove them.",
            [str(folder / name) for name in beside],
        )
    found, empty = [], []
    ignored: list[str] = []
    above = (os.path.realpath(folder),)
    for label in labels:
        names = sorted(_walk(folder / label, label, above, ignored))
        if not names:
            empty.append(label)
        found += [FoundPicture(name, str(folder / name), label) for name in names]
    if empty:
        listing.error(
            f"{folder} has {count(len(empty), 'class folder')} without pictures: "
            f"{some(empty)}; expected files with the suffix {', '.join(EXTENSIONS)}. Add "
            "pictures, or remove the folders.",
            [str(folder / label) for label in empty],
        )
    if ignored:
        kinds = Counter(
            os.path.splitext(name)[1].lower() or "without extension" for name in ignored
        )
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
        listing.warning(
            f"{folder}: ignored {count(len(ignored), 'file')} without the suffix of a picture: "
            f"{listed}.",
            [str(folder / name) for name in ignored],
        )
    return found


def pictures_below(folder: Path, ignored: list[str]) -> Iterator[str]:
    """The names of the pictures in a folder and its subfolders, relative to it.

    Other files are added to ``ignored``.
    """
    for entry in _entries(folder):
        if _is_folder(entry):
            above = (os.path.realpath(folder),)
            yield from _walk(folder / entry.name, entry.name, above, ignored)
        elif is_picture(entry.path):
            yield entry.name
        else:
            ignored.append(entry.name)


def _walk(folder: Path, name: str, above: Sequence[str], ignored: list[str]) -> Iterator[str]:
    """The names of the pictures in a folder and its subfolders. Cyclic links are skipped."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in _entries(folder):
        inside = f"{name}/{entry.name}"
        if _is_folder(entry):
            yield from _walk(folder / entry.name, inside, (*above, real), ignored)
        elif is_picture(entry.path):
            yield inside
        else:
            ignored.append(inside)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_hidden(entry.name)]


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder, in natural order."""
    return sorted((e.name for e in _entries(folder) if _is_folder(e)), key=natural_order)


def _pictures(folder: Path) -> list[str]:
    files = [entry for entry in _entries(folder) if not _is_folder(entry)]
    return sorted(entry.name for entry in files if is_picture(entry.path))


def csv_inside(folder: Path) -> str:
    """A sentence about CSV files in a folder, which may be meant; "" if there are none."""
    names = sorted(name for entry in _entries(folder) if (name := entry.name).endswith(".csv"))
    if not names:
        return ""
    pass_it = (
        "If it lists the pictures, pass it" if len(names) == 1 else "Pass the one you mean"
    )
    return f" The folder contains {some(names)}. {pass_it} instead of the folder."


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
