"""``MaskTargets``: each picture has a mask, with a class for each pixel."""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.data.coco_file import (
    CocoFile,
    coco_classes,
    read_coco,
    split_reference,
)
from tfimm_lora.finetuning.data.findings import ERROR, WARNING, Finding, Problem, count, some
from tfimm_lora.finetuning.data.listing import FoundPicture, Listing
from tfimm_lora.finetuning.data.mask_classes import (
    IGNORED_INDEX,
    MaskClasses,
    colour_text,
    read_classes,
)
from tfimm_lora.finetuning.data.mask_folders import list_masks
from tfimm_lora.finetuning.data.masks import (
    MaskContent,
    mask_content,
    mask_file,
    mask_identity,
    read_mask,
)
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.data.targets import Row, Targets, hash_order, validation_count

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, Split

#: The column of a CSV file with the paths of masks.
_MASK = "mask"

#: More classes than a model can have, as of masks that were saved as JPEG or are photographs.
_MOST_CLASSES = 200


@dataclass(frozen=True)
class MaskTargets(Targets):
    """A mask for each picture. ``Picture.label`` is its file.

    Args:
        masks: The folder of the masks, or a file of COCO. Default: inside the folder of the
            pictures.
        classes: The classes, or the file of a table; see ``read_classes``. Default: each index
            that occurs is a class, except 255; or the categories of the file of COCO.
    """

    masks: str | None = None
    classes: str | MaskClasses | None = None

    noun: ClassVar[str] = "class"
    nouns: ClassVar[str] = "classes"
    alike_agree: ClassVar[bool] = False
    are_pictures: ClassVar[bool] = True

    @property
    def header(self) -> str:
        return "path,mask"

    @property
    def sources(self) -> str:
        return (
            "a folder of pictures with the folder of their masks or a file of COCO (--masks), "
            "a folder with images/ and masks/, or a CSV file with path,mask"
        )

    # -- reading -------------------------------------------------------------------------

    def columns(self, header: Sequence[str]) -> tuple[str, ...]:
        return (_MASK,) if _MASK in header else ()

    def read(
        self, listing: Listing, path: Path, columns: Sequence[str], rows: Sequence[Row]
    ) -> list[Any]:
        found: list[str | None] = []
        missing = []
        for row in rows:
            cell = row.cells[_MASK].strip()
            file = os.path.normpath(path.parent / cell.replace("\\", "/"))
            found.append(file if cell and os.path.isfile(mask_file(file)) else None)
            if found[-1] is None:
                missing.append(f"{cell or '(empty)'} in line {row.line}")
        if missing:
            listing.error(
                f"{path} lists {count(len(missing), 'mask')} that "
                f"{'does' if len(missing) == 1 else 'do'} not exist: {some(missing)}; expected "
                f"absolute paths, or paths relative to {path.parent}.",
                cause=FileNotFoundError,
            )
        return found

    def listed(self, path: Path) -> Listing:
        masks = None if self.masks is None else Path(os.path.abspath(self.masks))
        return list_masks(path, masks)

    def resolved(self, listing: Listing) -> MaskTargets:
        """With the classes of the files of COCO, unless the classes are given.

        Records classes that do not fit the categories, and categories without objects.
        """
        found = [x.label for part in listing.parts.values() for x in part]
        references = [reference for x in found if (reference := split_reference(x)) is not None]
        try:
            files = [read_coco(x) for x in dict.fromkeys(file for file, _ in references)]
            if not files:
                return self
            classes = self.classes_of(()) if self.classes is not None else coco_classes(files)
        except (ValueError, OSError) as error:
            listing.error(str(error), cause=type(error))
            return self
        _check_categories(listing, files, classes)
        unused = {
            name
            for file in files
            for index, name in file.categories.items()
            if index not in classes.values
        }
        if unused and self.classes is None:
            listing.warning(
                f"{some([x.path for x in files])} {'has' if len(files) == 1 else 'have'} no "
                f"objects of these categories: {some(sorted(unused))}. They are no classes of "
                "the model."
            )
        return MaskTargets(self.masks, classes)

    def of_folder(self, listing: Listing, path: Path) -> None:
        """The files are the targets."""

    def names(self, listing: Listing, path: str) -> tuple[str, ...]:
        found = [x for part in listing.parts.values() for x in part]
        if not found:
            if not any(x.level == ERROR for x in listing.findings):
                listing.error(f"{path} has no pictures; expected at least two.")
            return ()
        try:
            return self._names([x.label for x in found])
        except (ValueError, FileNotFoundError) as error:
            listing.error(str(error), cause=type(error))
            return ()

    def _names(self, masks: Sequence[str]) -> tuple[str, ...]:
        if self.classes is not None:
            return self.classes_of(()).names
        seen: set[int] = set()
        for content in _contents(masks, False).values():
            if isinstance(content, MaskContent):
                seen |= content.counts.keys()
        indices = sorted(seen - {IGNORED_INDEX})
        advice = "Name the classes in a table: --classes (classes=)."
        if len(indices) > _MOST_CLASSES:
            raise ValueError(
                f"The masks have {len(indices)} different indices; expected one for each "
                f"class. Save masks as PNG: JPEG changes them. {advice}"
            )
        if len(indices) < 2:
            given = some([str(x) for x in sorted(seen)]) or "none that can be read"
            is_ignored = IGNORED_INDEX in seen
            raise ValueError(
                f"The masks have the indices {given}"
                f"{', of which 255 is ignored' if is_ignored else ''}; expected at least two "
                f"classes, of which one may be the background. {advice}"
            )
        return tuple(map(str, indices))

    def classes_of(self, names: Sequence[str]) -> MaskClasses:
        """The classes with these names.

        Raises:
            ValueError, FileNotFoundError: as ``read_classes``.
        """
        if isinstance(self.classes, MaskClasses):
            return self.classes
        if self.classes is not None:
            return _table(self.classes, os.path.getmtime(self.classes))
        return MaskClasses(tuple(names), tuple(map(int, names)))

    # -- parts ---------------------------------------------------------------------------

    def names_in(self, target: Any) -> tuple[str, ...]:
        return ()

    def divided(
        self, found: Sequence[FoundPicture], validation: float, seed: int
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Sort all pictures by the hashes of their names; the first go to val."""
        pictures = sorted(found, key=hash_order(seed))
        number = validation_count(len(pictures), validation)
        return pictures[number:], pictures[:number]

    def inspect(
        self, parts: Mapping[str, PictureSet], sizes: Mapping[str, tuple[int, int]]
    ) -> tuple[list[Problem], list[Finding]]:
        labels = next(iter(parts.values())).labels
        classes = self.classes_of(labels)
        pictures = [picture for part in parts.values() for picture in part.pictures]
        contents = _contents([x.label for x in pictures], classes.of_colours)
        problems, sized, unknown = [], [], defaultdict(list)
        for picture in pictures:
            content = contents[picture.label]
            if isinstance(content, UnreadablePicture):
                reason = f"its mask {picture.label} cannot be read: {content.reason}"
                problems.append(Problem(picture.path, os.path.basename(picture.label), reason))
                continue
            if sizes.get(picture.path, content.size) != content.size:
                sized.append((picture, content.size))
            for value in classes.unknown(list(content.counts)):
                unknown[value].append(picture)
        findings = [
            *_of_sizes(sized, sizes),
            *_of_unknown(unknown, classes),
        ]
        if not findings and "train" in parts:
            faults = self.faults(parts["train"])
            findings += [Finding(ERROR, f"In the data, {fault}") for fault in faults]
            findings += _of_missing(parts, self)
        return problems, findings

    def faults(self, train: PictureSet) -> list[str]:
        seen = [name for name, number in self.counts(train).items() if number]
        if len(seen) > 1:
            return []
        return [
            f"the masks of the training pictures have only {seen[0] if seen else 'no class'}; "
            "expected at least two classes."
        ]

    # -- numbers -------------------------------------------------------------------------

    def label(self, target: Any, names: Sequence[str]) -> str:
        return str(target)

    def array(self, labels: Sequence[Any]) -> np.ndarray:
        raise TypeError("Masks have no array; PictureBatches reads them with their pictures.")

    def picture(self, label: Any, names: Sequence[str]) -> np.ndarray:
        return read_mask(label, self.classes_of(names))

    def text(self, label: Any, names: Sequence[str]) -> str:
        return os.path.basename(str(label))

    def identity(self, label: Any) -> Any:
        return mask_identity(label)

    def counts(self, pictures: PictureSet) -> dict[str, int]:
        """The number of pictures with each class."""
        found = dict.fromkeys(pictures.labels, 0)
        for counts in self._pixels_of(pictures):
            for name in counts:
                found[name] += 1
        return found

    def pixels(self, pictures: PictureSet) -> dict[str, int]:
        """The number of pixels of each class in the masks of pictures."""
        found = Counter(dict.fromkeys(pictures.labels, 0))
        for counts in self._pixels_of(pictures):
            found.update(counts)
        return dict(found)

    def _pixels_of(self, pictures: PictureSet) -> list[dict[str, int]]:
        """The number of pixels of each class that occurs, for each mask that can be read."""
        classes = self.classes_of(pictures.labels)
        values = dict(zip(classes.numbers, classes.names))
        contents = _contents([x.label for x in pictures.pictures], classes.of_colours)
        found = []
        for picture in pictures.pictures:
            content = contents[picture.label]
            if isinstance(content, MaskContent):
                pairs = content.counts.items()
                found.append({values[x]: n for x, n in pairs if x in values})
        return found

    def cells(self, label: Any, names: Sequence[str]) -> dict[str, str]:
        return {_MASK: os.path.abspath(label)}

    def table(self, split: Split, left_out: Counter[str]) -> tuple[list[str], list[list[str]]]:
        """The numbers of pictures, and the share of pixels in the training part."""
        header, rows = super().table(split, left_out)
        pixels = self.pixels(split.train)
        total = sum(pixels.values()) or 1
        for row in rows[:-1]:
            row.append(f"{100 * pixels[row[0]] / total:.2g} %")
        rows[-1].append("")
        return [*header, "of the pixels"], rows


def _check_categories(
    listing: Listing, files: Sequence[CocoFile], classes: MaskClasses
) -> None:
    """Record an error if a file of COCO has other names for the indices of classes."""
    expected = dict(zip(classes.values, classes.names))
    for file in files:
        others = [
            f"{index} is {name} (expected {expected[index]})"
            for index, name in sorted(file.categories.items())
            if index in file.used and expected.get(index, name) != name
        ]
        if others or classes.of_colours:
            listing.error(
                f"The categories of {file.path} are not those of the classes: "
                f"{some(others) or 'the classes have colours'}; expected the ids as indices, "
                "with the same names."
            )


@functools.lru_cache(maxsize=16)
def _table(path: str, time: float) -> MaskClasses:
    return read_classes(path)


def _contents(
    paths: Sequence[str], of_colours: bool
) -> dict[str, MaskContent | UnreadablePicture]:
    """What is in some masks, or why they cannot be read."""

    def content(path: str) -> MaskContent | UnreadablePicture:
        try:
            return mask_content(path, of_colours)
        except UnreadablePicture as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(paths, pool.map(content, paths)))


def _of_sizes(
    found: Sequence[tuple[Picture, tuple[int, int]]], sizes: Mapping[str, tuple[int, int]]
) -> list[Finding]:
    if not found:
        return []
    texts = []
    for picture, (height, width) in found:
        rows, columns = sizes[picture.path]
        texts.append(f"{picture.label} ({width} x {height}, not {columns} x {rows})")
    message = (
        f"{count(len(found), 'mask has', 'masks have')} another size than "
        f"{'its picture' if len(found) == 1 else 'their pictures'}: {some(texts, 3)}; expected "
        "the same width and height. Resize masks with nearest neighbour."
    )
    return [Finding(ERROR, message, tuple(picture.path for picture, _ in found))]


def _of_unknown(found: Mapping[int, Sequence[Picture]], classes: MaskClasses) -> list[Finding]:
    if not found:
        return []
    texts = []
    for value, pictures in sorted(found.items()):
        what = colour_text(value) if classes.of_colours else str(value)
        texts.append(f"{what} in {some([x.label for x in pictures], 2)}")
    kind = "a colour" if classes.of_colours else "an index"
    files = dict.fromkeys(x.path for pictures in found.values() for x in pictures)
    message = (
        f"{count(len(files), 'mask has', 'masks have')} pixels with {kind} that no class has: "
        f"{some(texts, 5)}; expected {classes.expected}. Correct the masks, or the table of "
        "the classes (--classes)."
    )
    return [Finding(ERROR, message, tuple(files))]


def _of_missing(parts: Mapping[str, PictureSet], targets: MaskTargets) -> list[Finding]:
    """Warnings of classes that never occur, or not in validation."""
    seen = {name: targets.counts(part) for name, part in parts.items()}
    labels = parts["train"].labels
    never = [x for x in labels if not any(counts[x] for counts in seen.values())]
    findings = []
    untrained = [x for x in labels if not seen["train"][x] and x not in never]
    texts = {
        "No mask has": (never, "The model cannot learn them."),
        "No mask of a training picture has": (untrained, "The model cannot learn them."),
        "No mask of a validation picture has": (
            [x for x in labels if seen["train"][x] and not seen["val"][x]],
            "The model cannot be evaluated on them.",
        ),
    }
    for what, (names, result) in texts.items():
        if names:
            message = f"{what} pixels of these classes: {some(names)}. {result}"
            findings.append(Finding(WARNING, message))
    return findings
