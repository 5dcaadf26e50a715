"""``list_coco``: pictures, with masks in files of COCO."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tfimm_lora.finetuning.data.coco_file import CocoFile, coco_reference, read_coco
from tfimm_lora.finetuning.data.findings import count, some
from tfimm_lora.finetuning.data.folders import folders_in, pictures_below
from tfimm_lora.finetuning.data.listing import PARTS, UNSPLIT, FoundPicture, Listing
from tfimm_lora.utils.optional_imports import require

#: The word in the names of the files of COCO with objects. Others have points or texts.
_INSTANCES = "instances"

#: The files of COCO of each part. Several for one part are an error.
CocoFiles = dict[str, list[Path]]


def annotation_files(data: Path, masks: Path | None) -> CocoFiles:
    """The files of COCO in a folder without pictures, or the file that is given as ``masks``.

    The folder is ``masks`` or, without it, ``data/annotations``. The word train, val or test in
    the name of a file says for which part it is.
    """
    if masks is not None and masks.is_file() and masks.suffix.lower() == ".json":
        return {UNSPLIT: [masks]}
    folder = data / "annotations" if masks is None else masks
    if not folder.is_dir() or next(pictures_below(folder, []), None) is not None:
        return {}
    parts: CocoFiles = {}
    for file in _json_in(folder):
        words = re.findall("[a-z]+", file.stem.lower())
        part = next((PARTS[word] for word in words if word in PARTS), UNSPLIT)
        parts.setdefault(part, []).append(file)
    for part, files in parts.items():
        parts[part] = [x for x in files if _INSTANCES in x.stem.lower()] or files
    return parts


def files_beside(data: Path) -> CocoFiles:
    """The files of COCO beside the pictures, in the folder or in its train, val and test."""
    inside = {PARTS[x.lower()]: data / x for x in folders_in(data) if x.lower() in PARTS}
    listed = {part: _json_in(folder) for part, folder in (inside or {UNSPLIT: data}).items()}
    return {part: files for part, files in listed.items() if files}


def _json_in(folder: Path) -> list[Path]:
    return sorted(x for x in folder.iterdir() if x.suffix.lower() == ".json" and x.is_file())


def list_coco(data: Path, files: CocoFiles) -> Listing:
    """List the pictures of files of COCO.

    Args:
        data: The folder of the pictures. The names in a file are relative to its own folder,
            to ``data``, or to a folder in it; the folder where most of them are is used.
        files: The files, of ``annotation_files`` or ``files_beside``.
    """
    require("pycocotools.mask", extra="coco", why="Masks in a file of COCO")
    listing = Listing()
    folders = set()
    for part, (path, *others) in files.items():
        if others:
            listing.error(
                f"{path.parent} has {1 + len(others)} JSON files for "
                f"{part or 'all pictures'}: {some([x.name for x in (path, *others)])}; "
                "expected one file of COCO. Name it: --masks (masks=)."
            )
            continue
        try:
            file = read_coco(path)
        except (OSError, ValueError) as error:
            listing.error(str(error))
            continue
        folder = _folder_of(file, [path.parent, *_folders(data)])
        folders.add(folder)
        listing.parts[part] = _found(listing, file, folder)
    if len(listing.parts) < len(files):
        listing.parts = {}  # an error says why
        return listing
    _warn_of_others(listing, folders)
    listing.require_train(data)
    return listing


def _folders(data: Path) -> Iterator[Path]:
    """A folder, and the folders in it, down to the second level."""
    yield data
    for name in folders_in(data):
        yield data / name
        for inner in folders_in(data / name):
            yield data / name / inner


def _folder_of(file: CocoFile, folders: Sequence[Path]) -> Path:
    """The folder in which most of the pictures of a file are."""
    names = [x.name for x in file.pictures.values()][:1000]
    counts = {x: sum(os.path.isfile(x / name) for name in names) for x in folders}
    return max(counts, key=lambda x: counts[x])


def _found(listing: Listing, file: CocoFile, folder: Path) -> list[FoundPicture]:
    found, missing, boxes = [], [], []
    twice = [
        name for name, n in Counter(x.name for x in file.pictures.values()).items() if n > 1
    ]
    if twice:
        listing.error(
            f"{file.path} has {count(len(twice), 'picture')} twice: {some(twice)}; expected "
            "all objects of a picture with one id.",
            [str(folder / name) for name in twice],
        )
    for index, picture in file.pictures.items():
        path = str(folder / picture.name)
        if not os.path.isfile(path):
            missing.append(picture.name)
        elif not all(x.get("segmentation") for x in file.objects.get(index, ())):
            boxes.append(path)
        elif picture.name not in twice:
            reference = coco_reference(file.path, index)
            found.append(FoundPicture(picture.name, path, reference))
    if missing:
        listing.error(
            f"{file.path} lists {count(len(missing), 'picture')} that "
            f"{'is' if len(missing) == 1 else 'are'} not in {folder}: {some(missing)}; "
            "expected the folder of the pictures as --data (data=).",
            [str(folder / name) for name in missing],
            cause=FileNotFoundError,
        )
    if boxes:
        listing.error(
            f"{file.path}: {count(len(boxes), 'picture has', 'pictures have')} objects without "
            f"a segmentation, such as boxes: {some(boxes)}; expected polygons or run-length "
            "encodings of all objects.",
            boxes,
        )
    if not file.pictures:
        listing.error(f"{file.path} has no pictures; expected at least two.")
    return found


def _warn_of_others(listing: Listing, folders: set[Path]) -> None:
    """Warn of pictures in the folders that no file lists."""
    listed = {x.path for part in listing.parts.values() for x in part}
    listed |= {path for finding in listing.findings for path in finding.files}
    others = [
        path
        for folder in sorted(folders)
        for path in (str(folder / name) for name in pictures_below(folder, []))
        if path not in listed
    ]
    if others:
        listing.warning(
            f"{count(len(others), 'picture is', 'pictures are')} in no file of COCO: "
            f"{some(others)}. They are not used.",
            others,
        )
