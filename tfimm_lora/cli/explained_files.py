"""The files that ``predict --explain`` writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.cli.picture_sources import STDIN
from tfimm_lora.finetuning.explained_pictures import explain_pictures, png
from tfimm_lora.finetuning.run import Run
from tfimm_lora.utils.atomic_files import write_file

#: The most letters of the name of a picture or label in the name of a file.
_MOST_LETTERS = 60


class ExplainedFiles:
    """Write explanations into a folder, which is created for the first one.

    Args:
        run: The run whose answers are explained.
        folder: The folder.
        threshold: That of the answers; None for those of the run.

    Attributes:
        written: The number of files.
        method: The method and the layer in words.
        facts: The method and the layer for JSON; None as long as nothing is written.
    """

    def __init__(self, run: Run, folder: Path, threshold: float | None) -> None:
        self._task, self._preprocessing = run.task, run.preprocessing
        self._folder, self._threshold = folder, threshold
        self._used: set[str] = set()
        self.written, self.method = 0, ""
        self.facts: dict[str, Any] | None = None

    def write(
        self, model: Any, name: str, file: str, values: np.ndarray
    ) -> list[dict[str, str]]:
        """Explain the answer for a picture.

        Args:
            model: The model.
            name: The name of the picture, for the names of the files.
            file: The picture file.
            values: The prediction, a row of the ``values`` of the task.

        Returns:
            The labels that are explained, each with its file.

        Raises:
            ValueError: if the answers of the model cannot be explained.
        """
        targets = self._task.explained(values, self._threshold)
        if not targets:
            raise ValueError(
                f"Received --explain for the task {self._task.name!r}; expected a task whose "
                "predictions are labels or numbers. Leave out --explain."
            )
        layer = None if self.facts is None else self.facts["layer"]
        pairs = [(file, target) for target in targets]
        pictures, found = explain_pictures(model, pairs, self._preprocessing, layer=layer)
        self.method = str(found)
        self.facts = {"method": found.method, "layer": found.layer, "grid": list(found.grid)}
        self._folder.mkdir(parents=True, exist_ok=True)
        listed = []
        for target, picture in zip(targets, pictures):
            label = self._task.labels[target]
            path = self._folder / self._file_name(name, label)
            write_file(path, png(picture.drawn))
            listed.append({"label": label, "file": str(path)})
            self.written += 1
        return listed

    def _file_name(self, name: str, label: str) -> str:
        """A name that no other file of this command has, on any system."""
        picture = "stdin" if name == STDIN else Path(name).stem
        parts = (re.sub(r"[^\w.-]+", "_", text)[:_MOST_LETTERS] for text in (picture, label))
        stem = "-".join(parts)
        found, number = f"{stem}.png", 1
        while found.casefold() in self._used:
            number += 1
            found = f"{stem}-{number}.png"
        self._used.add(found.casefold())
        return found
