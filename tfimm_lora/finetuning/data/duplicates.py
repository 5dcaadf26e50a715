"""Pictures that occur more than once: identical files, and pictures that look alike."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tfimm_lora.finetuning.data.dataset import Picture, Split
from tfimm_lora.finetuning.data.findings import WARNING, Finding, Problem, count, some
from tfimm_lora.utils.optional_imports import require

#: Of identical pictures, that in the later part is kept.
_PART_ORDER = ("train", "val", "test")

_SIDE = 16
#: Pictures look alike if their thumbnails differ by this much on average, of 255. Saving a
#: picture as jpeg again, or in another size, changes less.
_MOST_DIFFERENCE = 3.0
#: The least standard deviation of a thumbnail that is compared: blank pictures are all alike.
_LEAST_CONTRAST = 8.0


@dataclass(frozen=True)
class Fingerprint:
    """What two pictures are compared by.

    Attributes:
        digest: The SHA-256 of the file.
        size: The height and width of the picture.
        thumbnail: The picture in grey, reduced to 16 x 16, as int16.
    """

    digest: bytes
    size: tuple[int, int]
    thumbnail: np.ndarray


def fingerprint(path: str, pixels: np.ndarray) -> Fingerprint:
    """The fingerprint of a file and its pixels, (height, width, 3) in uint8."""
    image = require("PIL.Image", extra="cli", why="Comparing pictures")
    small = image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), image.Resampling.BOX)
    digest = hashlib.sha256(Path(path).read_bytes()).digest()
    return Fingerprint(digest, (pixels.shape[0], pixels.shape[1]), np.asarray(small, "int16"))


def identical_pictures(
    split: Split, prints: Mapping[str, Fingerprint]
) -> tuple[list[Problem], list[Finding]]:
    """Find identical files.

    Returns:
        The pictures to leave out, because the same file has another label, or is also in a part
        that must not share pictures with theirs; and a warning about those in one class of one
        part, which count more than once.
    """
    groups: dict[bytes, list[tuple[str, Picture]]] = defaultdict(list)
    for name, part in split.parts().items():
        for picture in part.pictures:
            if picture.path in prints:
                groups[prints[picture.path].digest].append((name, picture))
    problems, repeated = [], []
    for group in (x for x in groups.values() if len(x) > 1):
        last = max((name for name, _ in group), key=_PART_ORDER.index)
        kept = next(picture for name, picture in group if name == last)
        identities = {
            picture.path: split.targets.identity(picture.label) for _, picture in group
        }
        labels = set(identities.values())
        for name, picture in group:
            label, own = split.train.text(picture), identities[picture.path]
            other = next((x for _, x in group if identities[x.path] != own), None)
            if other is not None:
                reason = f"identical to {other.path}, whose label is {split.train.text(other)}"
                problems.append(Problem(picture.path, label, f"{reason}."))
            elif name != last:
                reason = f"identical to {kept.path}, which is in {last}"
                problems.append(Problem(picture.path, label, f"{reason}."))
        copies = [picture.path for name, picture in group if name == last]
        if len(labels) == 1 and len(copies) > 1:
            repeated.append(copies)
    if not repeated:
        return problems, []
    extra = sum(len(copies) - 1 for copies in repeated)
    same = "class" if split.targets.is_exclusive else "labels"
    message = (
        f"{count(extra, 'picture is', 'pictures are')} identical to another of the same "
        f"{same}: {some([' = '.join(copies) for copies in repeated], 3)}. They count more than "
        "once."
    )
    files = tuple(path for copies in repeated for path in copies[1:])
    return problems, [Finding(WARNING, message, files)]


def similar_pictures(split: Split, prints: Mapping[str, Fingerprint]) -> list[Finding]:
    """Warn about pictures that look alike but have other labels, or are in other parts."""
    listed = [
        (name, picture)
        for name, part in split.parts().items()
        for picture in part.pictures
        if picture.path in prints
    ]
    labels, parts, same = [], [], []
    for i, j in _alike([prints[picture.path] for _, picture in listed]):
        (first_part, first), (second_part, second) = listed[i], listed[j]
        pair = f"{first.path} and {second.path}"
        differ = first.label != second.label
        if differ and split.targets.alike_agree:
            labels.append(pair)
        elif first_part != second_part and (not differ or split.targets.are_pictures):
            parts.append(pair)
        elif not differ:
            same.append(pair)
    texts = {
        "look alike but have different labels": labels,
        "look alike and are in different parts, which makes the results too good": parts,
        f"of one {'class' if split.targets.is_exclusive else 'label'} look alike": same,
    }
    return [
        Finding(WARNING, f"{count(len(found), 'pair')} of pictures {text}: {some(found, 3)}.")
        for text, found in texts.items()
        if found
    ]


def _alike(prints: list[Fingerprint]) -> Iterator[tuple[int, int]]:
    """The indices of the pairs whose thumbnails hardly differ, each pair once.

    Only pictures that agree in two quarters of a 64-bit hash (whether each pixel is brighter
    than its neighbour) are compared, which finds all pairs whose hashes differ in at most two
    bits.
    """
    if len(prints) < 2:
        return
    thumbnails = np.stack([x.thumbnail for x in prints])
    flat = thumbnails.reshape(len(prints), -1)
    usable = np.flatnonzero(flat.std(axis=1) >= _LEAST_CONTRAST)
    quarters = _hashes(thumbnails)
    seen: set[tuple[int, int]] = set()
    for first, second in itertools.combinations(range(4), 2):
        buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place in usable.tolist():
            key = int(quarters[place, first]), int(quarters[place, second])
            buckets[key].append(place)
        for bucket in (x for x in buckets.values() if len(x) > 1):
            for i, j in _close_pairs(flat, np.array(bucket)):
                if prints[i].digest != prints[j].digest and (i, j) not in seen:
                    seen.add((i, j))
                    yield i, j


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """64 bits for each thumbnail, as four numbers of 16 bits."""
    n = len(thumbnails)
    small = thumbnails.reshape(n, 8, 2, 8, 2).mean(axis=(2, 4))
    brighter = small > np.roll(small, 1, axis=2)
    weights = 1 << np.arange(16)
    return np.asarray((brighter.reshape(n, 4, 16) * weights).sum(axis=2))


def _close_pairs(flat: np.ndarray, bucket: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs in a bucket that differ little. Those whose means differ more are skipped."""
    means = flat[bucket].mean(axis=1)
    order = np.argsort(means, kind="stable")
    bucket, means = bucket[order], means[order]
    ends = np.searchsorted(means, means + _MOST_DIFFERENCE, side="right")
    for place, end in enumerate(ends):
        others = bucket[place + 1 : end]
        distances = np.abs(flat[others] - flat[bucket[place]]).mean(axis=1)
        for other in others[distances <= _MOST_DIFFERENCE]:
            pair = sorted((int(bucket[place]), int(other)))
            yield pair[0], pair[1]
