"""The masks that ``predict`` writes."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.cli.outputs import new_file
from tfimm_lora.cli.picture_sources import STDIN
from tfimm_lora.finetuning.mask_prediction import shares, write_mask, write_overlay
from tfimm_lora.finetuning.tasks.segmentation import Segmentation

#: The end of the names of overlays.
_OVERLAY = "_overlay.png"


class MaskFiles:
    """Writes the masks of pictures, and overlays, into a folder.

    Args:
        task: The segmentation.
        names: The pictures, whose masks get their names with the suffix ".png". Pictures of the
            same name in several folders get the folders, too.
        folder: The folder; None to write nothing.
        overlays: Whether to write overlays.
        overwrite: Whether files may be replaced.
        tile: Whether large pictures are cut into tiles.
    """

    def __init__(
        self,
        task: Segmentation,
        names: list[str],
        folder: Path | None,
        overlays: bool,
        overwrite: bool,
        tile: bool,
    ) -> None:
        self.task, self.folder = task, folder
        self.overlays, self.overwrite, self.tile = overlays, overwrite, tile
        self._stems = _stems(names)

    def answer(self, name: str, file: str, found: np.ndarray) -> dict[str, Any]:
        """Write what is asked for; return the answer for a picture.

        Args:
            name: The name of the picture.
            file: Its file.
            found: The index of the class of each pixel.
        """
        classes = self.task.mask_classes
        values = shares(found, len(classes.names))
        answer = self.task.views.answer(name, values, None, None)
        if self.folder is None:
            return answer
        path = self.folder / f"{self._stems[name]}.png"
        with new_file(path, self.overwrite) as temporary:
            write_mask(temporary, found, classes)
        answer["mask"] = str(path)
        if self.overlays:
            path = self.folder / f"{self._stems[name]}{_OVERLAY}"
            with new_file(path, self.overwrite) as temporary:
                write_overlay(temporary, file, found, classes)
            answer["overlay"] = str(path)
        return answer


def _stems(names: list[str]) -> dict[str, str]:
    """A different name without suffix for each picture, as short as possible.

    Example:
        >>> _stems(["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/1.png"])
        {'a/1.jpg': 'a-1', 'a/2.jpg': '2', 'b/1.jpg': 'b-1', 'b/1.png': 'b-1-2'}
    """
    short = {name: "stdin" if name == STDIN else _stem(name) for name in names}
    counts = Counter(short.values())
    taken: Counter[str] = Counter()
    found = {}
    for name in names:
        stem = short[name]
        if counts[stem] > 1:
            parent = os.path.basename(os.path.dirname(name))
            stem = f"{parent}-{stem}" if parent else stem
        taken[stem] += 1
        found[name] = stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"
    return found


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name.partition("?")[0]))[0] or "picture"
