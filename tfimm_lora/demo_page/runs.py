"""``DemoRuns``: the runs of the page, with as few base models in memory as possible."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.evaluation import predict_pictures
from tfimm_lora.finetuning.explained_pictures import ExplainedPicture, explain_pictures
from tfimm_lora.finetuning.mask_prediction import mask_over, predict_masks, shares
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.shared_base import SharedBase
from tfimm_lora.finetuning.tasks.base import Table, Task
from tfimm_lora.finetuning.tasks.segmentation import Segmentation
from tfimm_lora.model.state import record_task


class Answer(NamedTuple):
    """The answer for a picture.

    Attributes:
        table: A table with one row, as ``tfimm-lora predict`` prints it.
        notes: What else should be said about it.
        labels: What each explanation is about.
        pictures: The explanations.
        method: The method and the layer in words; "" without explanations.
        masked: Of a segmentation, the picture with the colours of the classes over it.
    """

    table: Table
    notes: list[str]
    labels: list[str]
    pictures: list[ExplainedPicture]
    method: str
    masked: np.ndarray | None = None


class _Model:
    """A base model, and the run whose adapter it has now."""

    def __init__(self, run: Run) -> None:
        self.base, self.outputs = SharedBase.of_run(run), len(run.labels)
        self.current: Run | None = None

    def fits(self, run: Run) -> bool:
        """Whether an adapter of the run gives the same outputs on this base."""
        return len(run.labels) == self.outputs and not self.base.differences(run)

    def with_adapter(self, run: Run) -> Any:
        """The model with the adapter of a run."""
        if self.current is not run:
            self.current = None
            load_adapter(self.base.model, run.adapter)
            record_task(self.base.model, run.task.record())
            self.current = run
        return self.base.model


class DemoRuns:
    """Runs, and the answers of their models. Adapters of runs with the same base, preprocessing
    and number of outputs share one model, into which they are loaded when they are asked for.

    Args:
        runs: The folders of the runs.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``Run.open``, ``Run.adapter`` and
            ``Run.base``.
        ValueError: if a run is given twice.
    """

    def __init__(self, runs: Sequence[str | os.PathLike[str]]) -> None:
        paths = [os.path.abspath(path) for path in runs]
        if len(set(map(os.path.realpath, paths))) < len(paths):
            raise ValueError(
                f"Received the runs {', '.join(map(str, runs))}; expected each of them once."
            )
        short = [os.path.basename(path) for path in paths]
        names = [n if short.count(n) == 1 else path for n, path in zip(short, paths)]
        self._runs = {name: Run.open(path) for name, path in zip(names, paths)}
        for run in self._runs.values():
            _ = run.adapter  # raises if there is none yet
        self._lock = threading.Lock()
        self._models: dict[str, _Model] = {}
        for name, run in self._runs.items():
            known = (model for model in self._models.values() if model.fits(run))
            self._models[name] = next(known, None) or _Model(run)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the runs: those of their folders, or whole paths if these are alike."""
        return tuple(self._runs)

    @property
    def models(self) -> int:
        """The number of base models in memory."""
        return len(set(self._models.values()))

    def about(self, name: str) -> str:
        """The model and the task of a run, in a line."""
        run = self._runs[name]
        targets = run.task.targets()
        noun = targets.noun if len(run.labels) == 1 else targets.nouns
        line = f"{run.recipe['model']}: {len(run.labels)} {noun}"
        if run.unfinished is not None:
            line += ". Unfinished: {} of {} epochs are complete".format(*run.unfinished)
        return line

    def answer(self, name: str, picture: str, explain: bool = True) -> Answer:
        """The answer of a run for a picture.

        Args:
            name: The name of the run.
            picture: The picture file.
            explain: Whether to explain it. Masks are not explained.

        Raises:
            UnreadablePicture: if the file cannot be read.
            ValueError: if the answer cannot be explained.
        """
        run = self._runs[name]
        task, preprocessing = run.task, run.preprocessing
        with self._lock:
            model = self._models[name].with_adapter(run)
            if isinstance(task, Segmentation):
                return _mask(model, picture, preprocessing, task)
            [(_, values)] = predict_pictures(model, [picture], preprocessing, task=task)
            if not isinstance(values, np.ndarray):
                raise values
            table, notes = _in_words(picture, values, task)
            targets = task.explained(values) if explain else ()
            if not targets:
                return Answer(table, notes, [], [], "")
            pairs = [(picture, target) for target in targets]
            pictures, found = explain_pictures(model, pairs, preprocessing)
        labels = [task.labels[target] for target in targets]
        return Answer(table, notes, labels, pictures, str(found))


def _mask(model: Any, picture: str, preprocessing: Preprocessing, task: Segmentation) -> Answer:
    """The shares of the classes of a segmentation, and the picture with its mask."""
    [(_, found)] = predict_masks(model, [picture], preprocessing, task=task)
    if not isinstance(found, np.ndarray):
        raise found
    # The second column, and the notes, are about files with masks.
    (header, [row], text), _ = _in_words(picture, shares(found, len(task.labels)), task)
    table = Table(header[:1], [row[:1]], text[:1])
    return Answer(table, [], [], [], "", mask_over(picture, found, task.mask_classes))


def _in_words(picture: str, values: np.ndarray, task: Task) -> tuple[Table, list[str]]:
    """The table of an answer, and the notes to it."""
    answer = task.views.answer(picture, values, None, None)
    return task.views.answer_table([answer]), task.views.notes([answer], None)
