"""``list_masks``: pictures and their masks in two folders, paired by name."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tfimm_lora.finetuning.data.coco_folders import annotation_files, files_beside, list_coco
from tfimm_lora.finetuning.data.findings import count, some
from tfimm_lora.finetuning.data.folders import folders_in, pictures_below
from tfimm_lora.finetuning.data.listing import PARTS, UNSPLIT, FoundPicture, Listing

#: The names of the folders of pictures and of masks inside one folder.
PICTURES = ("images", "pictures", "img", "imgs")
MASKS = ("masks", "labels", "annotations", "mask", "segmentations")

#: What the name of a mask may have behind that of its picture.
SUFFIXES = ("", "_mask", "_label", "_L")

#: The folders of pictures and masks of a part.
_Pair = tuple[Path, Path]


def list_masks(data: Path, masks: Path | None) -> Listing:
    """List pictures with their masks.

    A mask has the name of its picture, with any suffix of a picture, and may have one of
    ``SUFFIXES`` behind it: ``a/1.jpg`` and ``a/1_mask.png``.

    Args:
        data: The folder of pictures; without ``masks``, one with folders for both, such as
            ``images`` and ``masks``.
        masks: The folder of masks, or a file of COCO or a folder of such; see ``list_coco``.

    Both may have folders for the parts: ``train``, ``val`` and ``test``, above or below.
    """
    annotations = annotation_files(data, masks)
    if annotations:
        return list_coco(data, annotations)
    listing = Listing()
    pairs = _pairs(data) if masks is None else _pair(listing, data, masks)
    beside = {} if pairs or masks is not None else files_beside(data)
    if beside:
        return list_coco(data, beside)
    if masks is None and not pairs:
        listing.error(
            f"{data} has no folders of pictures and of masks; expected images/ and masks/ in "
            "it, or in its train/ and val/, or the folder of the masks or a file of COCO: "
            "--masks (masks=)."
        )
    for part, (pictures, answers) in pairs.items():
        found = _paired(listing, pictures, answers)
        in_parts = defaultdict(list)
        for x in found:
            first, *rest = PurePosixPath(x.name).parts
            in_parts[PARTS.get(first.lower(), UNSPLIT) if rest else UNSPLIT].append(x)
        if part == UNSPLIT and "train" in in_parts and UNSPLIT not in in_parts:
            listing.parts.update(in_parts)
        else:
            listing.parts[part] = found
    listing.require_train(data)
    return listing


def _pair(listing: Listing, data: Path, masks: Path) -> dict[str, _Pair]:
    """The given folders of pictures and masks."""
    if masks.is_dir():
        return {UNSPLIT: (data, masks)}
    listing.error(
        f"Received masks={str(masks)!r}, which is no folder; expected the folder of the masks "
        "of the pictures, or a file of COCO (.json).",
        cause=ValueError if masks.exists() else FileNotFoundError,
    )
    return {}


def _pairs(data: Path) -> dict[str, _Pair]:
    """The folders of pictures and masks of each part in a folder; none without train."""
    inside = _both(data)
    if inside is not None:
        return {UNSPLIT: inside}
    found = {PARTS[x.lower()]: _both(data / x) for x in folders_in(data) if x.lower() in PARTS}
    pairs = {part: pair for part, pair in found.items() if pair is not None}
    return pairs if "train" in pairs else {}


def _both(folder: Path) -> _Pair | None:
    names = {name.lower(): name for name in folders_in(folder)}
    pictures = next((names[x] for x in PICTURES if x in names), None)
    masks = next((names[x] for x in MASKS if x in names), None)
    return None if pictures is None or masks is None else (folder / pictures, folder / masks)


def _paired(listing: Listing, pictures: Path, masks: Path) -> list[FoundPicture]:
    ignored: list[str] = []
    names = sorted(_below(pictures, masks, ignored))
    answers = sorted(_below(masks, pictures, ignored))
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in answers:
        by_stem[_stem(name)].append(name)
    found, without, several = [], [], []
    used: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem = _stem(name)
        matching = [x for suffix in SUFFIXES for x in by_stem.get(stem + suffix, ())]
        if not matching:
            without.append(name)
        elif len(matching) > 1:
            several.append(f"{name}: {some(matching)}")
        else:
            used[matching[0]].append(name)
            found.append(FoundPicture(name, str(pictures / name), str(masks / matching[0])))
        for mask in matching[1:]:
            used[mask].append(name)
    shared = {mask: users for mask, users in used.items() if len(users) > 1}
    kept = [x for x in found if os.path.relpath(x.label, masks) not in shared]
    if without:
        listing.error(
            f"{count(len(without), 'picture')} in {pictures} "
            f"{'has' if len(without) == 1 else 'have'} no mask in {masks}: {some(without)}; "
            "expected a file of the same name for each, such as 1.png for 1.jpg. Add the "
            "masks, or remove the pictures.",
            [str(pictures / name) for name in without],
        )
    if several:
        listing.error(
            f"{count(len(several), 'picture')} in {pictures} "
            f"{'has' if len(several) == 1 else 'have'} several masks: {some(several, 3)}; "
            "expected one for each.",
            [str(pictures / text.partition(": ")[0]) for text in several],
        )
    if shared:
        texts = [f"{mask} of {some(users)}" for mask, users in shared.items()]
        listing.error(
            f"{count(len(shared), 'mask')} in {masks} would be of several pictures: "
            f"{some(texts, 3)}; expected pictures whose names differ in more than the suffix.",
            [str(pictures / name) for users in shared.values() for name in users],
        )
    unused = [name for name in answers if name not in used]
    if unused:
        listing.warning(
            f"{count(len(unused), 'mask')} in {masks} "
            f"{'has' if len(unused) == 1 else 'have'} no picture in {pictures}: "
            f"{some(unused)}. They are not used.",
            [str(masks / name) for name in unused],
        )
    if ignored:
        listing.warning(
            f"ignored {count(len(ignored), 'file')} in {pictures} and {masks} without the "
            f"suffix of a picture: {some(ignored)}."
        )
    if not names:
        listing.error(f"{pictures} has no pictures; expected at least two.")
    return kept


def _below(folder: Path, other: Path, ignored: list[str]) -> Iterator[str]:
    """The names of the pictures in a folder and its subfolders, without those in ``other``."""
    inside = os.path.relpath(other, folder)
    yield from _outside(inside, pictures_below(folder, ignored))


def _outside(folder: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith(f"{folder}/"))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
