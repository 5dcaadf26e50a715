"""``read_coco`` reads a file of COCO; ``coco_mask`` draws the objects of a picture as a mask.

Format: https://cocodataset.org/#format-data. Polygons and run-length encodings are drawn by
pycocotools.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.finetuning.data.findings import count, some
from tfimm_lora.finetuning.data.mask_classes import MaskClasses
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.utils.optional_imports import require

#: The class of the pixels in no object.
BACKGROUND = "background"

#: The mask of a picture: the file, and the id of the picture.
_REFERENCE = re.compile(r"(?P<file>.+\.json)#(?P<picture>\d+)", re.IGNORECASE)


class CocoPicture(NamedTuple):
    """A picture in a file of COCO: the name of its file, and its size."""

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoFile:
    """What a file of COCO says.

    Attributes:
        path: The file.
        pictures: The pictures by id.
        objects: The annotations of each picture, by its id.
        categories: The names of all categories by id.
    """

    path: str
    pictures: Mapping[int, CocoPicture]
    objects: Mapping[int, Sequence[Mapping[str, Any]]]
    categories: Mapping[int, str]

    @property
    def background(self) -> int:
        """The index of pixels in no object: 0, or the next index if a category has 0.

        A category with the name "background" has its own.
        """
        for index, name in self.categories.items():
            if name.lower() == BACKGROUND:
                return index
        return 0 if 0 not in self.categories else max(self.categories) + 1

    @property
    def used(self) -> set[int]:
        """The ids of the categories of which there are objects."""
        return {x["category_id"] for objects in self.objects.values() for x in objects}


def coco_reference(path: str | Path, picture: int) -> str:
    """The mask of a picture as a string, which stands for a file of a mask.

    Example:
        >>> from tfimm_lora.finetuning.data.coco_file import coco_reference, split_reference
        >>> coco_reference("cells.json", 7), split_reference("cells.json#7")
        ('cells.json#7', ('cells.json', 7))
    """
    return f"{path}#{picture}"


def split_reference(mask: str) -> tuple[str, int] | None:
    """The file and the id of a picture in a ``coco_reference``; None for other masks."""
    found = _REFERENCE.fullmatch(mask)
    return None if found is None else (found["file"], int(found["picture"]))


_read: dict[str, tuple[tuple[int, int], CocoFile]] = {}
_lock = threading.Lock()


def read_coco(path: str | Path) -> CocoFile:
    """Read a file of COCO. One that has not changed is read once.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file.
    """
    path = str(path)
    with _lock:
        stat = os.stat(path)
        state = stat.st_mtime_ns, stat.st_size
        if path not in _read or _read[path][0] != state:
            _read[path] = state, _parsed(path)
        return _read[path][1]


def coco_mask(path: str, picture: int) -> np.ndarray:
    """The id of the category of each pixel of a picture, int32 (h, w).

    Where objects overlap, the pixel belongs to the one with the smallest area. Groups of
    objects (``iscrowd``) count as their category. Other pixels have ``CocoFile.background``.

    Raises:
        UnreadablePicture: if the file has no such picture, or an object cannot be drawn.
        ImportError: without pycocotools.
    """
    coco = require("pycocotools.mask", extra="coco", why="Masks in a file of COCO")
    reference = coco_reference(path, picture)
    try:
        file = read_coco(path)
    except (OSError, ValueError) as error:
        raise UnreadablePicture(reference, str(error)) from error
    if picture not in file.pictures:
        raise UnreadablePicture(reference, f"{path} has no picture with the id {picture}.")
    _, height, width = file.pictures[picture]
    drawn = []
    for number, entry in enumerate(file.objects.get(picture, ())):
        try:
            encoded = _encoded(coco, entry["segmentation"], height, width)
        except Exception as error:  # pycocotools raises anything
            what = f"its object {entry.get('id', number)} cannot be drawn: {error}"
            raise UnreadablePicture(reference, what) from error
        drawn.append((float(coco.area(encoded)), entry["category_id"], encoded))
    mask = np.full((height, width), file.background, np.int32)
    for _, category, encoded in sorted(drawn, key=lambda x: -x[0]):
        mask[coco.decode(encoded).astype(bool)] = category
    return mask


def _encoded(coco: Any, shape: Any, height: int, width: int) -> Any:
    """The run-length encoding of one object."""
    if isinstance(shape, Mapping):
        if list(shape["size"]) != [height, width]:
            raise ValueError(f"it has the size {shape['size']}, its picture {[height, width]}")
        if isinstance(shape["counts"], str):
            return {"size": [height, width], "counts": shape["counts"].encode()}
        return coco.frPyObjects(dict(shape), height, width)
    short = [len(polygon) for polygon in shape if len(polygon) < 6 or len(polygon) % 2]
    if short:
        raise ValueError(
            f"a polygon has {short[0]} numbers; expected x and y of 3 points or more"
        )
    return coco.merge(coco.frPyObjects([list(map(float, x)) for x in shape], height, width))


def coco_classes(files: Iterable[CocoFile]) -> MaskClasses:
    """The background, and each category of which there are objects, with their ids.

    Raises:
        ValueError: if the files have different categories, or two have one name.
    """
    files = list(files)
    first = files[0]
    for file in files[1:]:
        if file.categories != first.categories:
            raise ValueError(
                f"{first.path} has the categories {_named(first.categories)}; {file.path} has "
                f"{_named(file.categories)}; expected the same ids and names in both."
            )
    used = set().union(*(file.used for file in files)) - {first.background}
    named = {first.background: first.categories.get(first.background, BACKGROUND)}
    named.update({index: first.categories[index] for index in sorted(used)})
    return MaskClasses(tuple(named.values()), tuple(named), ())


def _named(categories: Mapping[int, str]) -> str:
    return some([f"{index} ({name})" for index, name in sorted(categories.items())], 12)


def _parsed(path: str) -> CocoFile:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    keys = ("images", "annotations", "categories")
    given = values if isinstance(values, dict) else {}
    missing = [key for key in keys if not isinstance(given.get(key), list)]
    if missing:
        raise ValueError(
            f"{path} is not a file of COCO: it has no list {' and no list '.join(missing)}; "
            "expected images, annotations and categories."
        )
    try:
        pictures = _by_id(path, "images", given["images"], _picture)
        categories = _by_id(path, "categories", given["categories"], lambda x: str(x["name"]))
        objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for x in given["annotations"]:
            objects[x["image_id"]].append({**x, "category_id": x["category_id"]})
    except KeyError as error:
        raise ValueError(f"{path} has an entry without {error}.") from error
    except TypeError as error:
        raise ValueError(f"{path} has a damaged entry: {error}.") from error
    file = CocoFile(path, pictures, dict(objects), categories)
    for kind, unknown in (
        ("pictures", objects.keys() - pictures.keys()),
        ("categories", file.used - categories.keys()),
    ):
        if unknown:
            listed = some([str(x) for x in sorted(unknown, key=str)])
            raise ValueError(
                f"{path}: the annotations name {count(len(unknown), 'id')} of {kind} that the "
                f"file does not have: {listed}."
            )
    return file


def _by_id(
    path: str, kind: str, entries: Sequence[Mapping[str, Any]], value: Any
) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for x in entries:
        index = x["id"]
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or index in found:
            raise ValueError(
                f"{path}: {kind} have the id {index!r}"
                f"{' twice' if index in found else ''}; expected different integers."
            )
        found[index] = value(x)
    return found


def _picture(entry: Mapping[str, Any]) -> CocoPicture:
    name = str(entry["file_name"]).replace("\\", "/")  # of Windows
    return CocoPicture(name, int(entry["height"]), int(entry["width"]))
