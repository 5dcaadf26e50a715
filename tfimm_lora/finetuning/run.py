"""``Run``: the folder of a fine-tuning run and the model in it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.finetuning.base.names import TIMM, is_model_file
from tfimm_lora.finetuning.base.opened import BaseModel
from tfimm_lora.finetuning.base.origin import file_hash, find_moved_file, weights_digest
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.data.dataset import Split, find_pictures
from tfimm_lora.finetuning.data.findings import Problem
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.targets import PATH
from tfimm_lora.finetuning.data.targets import SPLIT as SPLIT_COLUMN
from tfimm_lora.finetuning.metrics_csv import read_metrics
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.finetuning.tasks.named import DEFAULT, task_named, task_of_record
from tfimm_lora.finetuning.training import ADAPTER, METRICS
from tfimm_lora.model.state import record_task
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.utils.atomic_files import write_file
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.utils.yaml_text import read_yaml_text

CONFIG, LABELS, SPLIT, SKIPPED = "config.yaml", "labels.txt", "split.csv", "skipped.csv"
LOCK = ".lock"
#: The folder of the search for settings, if there was one, its result, and a part of that.
TUNING, SEARCH, SUMMARY = "tuning", "search.json", "summary"
BASE_WEIGHTS = "base.weights.h5"
#: The sections of the config: the settings and the results.
RECIPE, FACTS = "recipe", "facts"


@dataclass(frozen=True)
class Run:
    """The folder of a fine-tuning run, as ``tfimm-lora finetune --out`` writes it.

    Example:
        >>> from tfimm_lora.finetuning.run import Run
        >>> Run.open("no/such/run")
        Traceback (most recent call last):
        FileNotFoundError: no/such/run is not a finetune run: it has no config.yaml.
    """

    path: Path
    config: dict[str, Any]

    # -- writing -----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        recipe: Mapping[str, Any],
        split: Split,
        skipped: Iterable[Problem],
        base_weights: Path | None = None,
        **facts: Any,
    ) -> Run:
        """Create the folder of a run with everything that is known before training.

        ``config.yaml`` is written last. ``base_weights`` is a weight file of the ordinary model
        if its weights are random.
        """
        run = cls(Path(path), {RECIPE: dict(recipe), FACTS: facts})
        run.path.mkdir(parents=True, exist_ok=True)
        write_file(run.path / LABELS, "".join(f"{label}\n" for label in split.labels))
        write_file(run.path / SPLIT, split_text(split))
        bad = [(x.path, x.reason) for x in skipped]
        write_file(run.path / SKIPPED, _csv_text((PATH, "reason"), bad))
        if base_weights is not None:
            shutil.copyfile(base_weights, run.path / BASE_WEIGHTS)
        run.save()
        return run

    def add_facts(self, **facts: Any) -> None:
        """Add results of the run and write ``config.yaml``."""
        self.config[FACTS].update(facts)
        self.save()

    def save(self) -> None:
        """Write ``config.yaml``."""
        yaml = require("yaml", extra="cli", why="config.yaml")
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        write_file(self.path / CONFIG, text)

    # -- reading -----------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open the folder of a run.

        Raises:
            FileNotFoundError: if the folder is not a run.
            ValueError: if its config cannot be read.
        """
        folder = Path(path)
        config = folder / CONFIG
        if not config.is_file():
            raise FileNotFoundError(f"{folder} is not a finetune run: it has no {CONFIG}.")
        read = read_yaml(config)
        if not isinstance(read.get(RECIPE), dict) or not isinstance(read.get(FACTS), dict):
            raise ValueError(
                f"{config} is not the config of a run; expected the sections {RECIPE} and "
                f"{FACTS}."
            )
        return cls(folder, read)

    @property
    def recipe(self) -> dict[str, Any]:
        """The settings of the run."""
        recipe: dict[str, Any] = self.config[RECIPE]
        return recipe

    @property
    def facts(self) -> dict[str, Any]:
        """The results of the run: parameters, seconds, best epoch, versions, ..."""
        facts: dict[str, Any] = self.config[FACTS]
        return facts

    @property
    def labels(self) -> list[str]:
        """The names of the classes, labels or numbers, in the order of the outputs."""
        return (self.path / LABELS).read_text(encoding="utf-8").splitlines()

    @property
    def config_path(self) -> Path:
        """The file with the settings and results."""
        return self.path / CONFIG

    @property
    def task(self) -> Task:
        """What the model was fine-tuned for. Runs of earlier versions are classifications."""
        if "task" not in self.facts:
            return Classification(tuple(self.labels))
        return task_of_record(TaskRecord.from_dict(self.facts["task"]))

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the input of the model."""
        return Preprocessing.from_dict(self._fact("preprocessing"))

    @property
    def base_returned_probabilities(self) -> bool:
        """Whether the model ended in a softmax or sigmoid before it was fine-tuned."""
        return bool(self.facts.get("base_returned_probabilities"))

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """The number of completed and of requested epochs of a run that can be resumed.

        None if all epochs are complete or the training was stopped early.
        """
        done, requested = len(self.history), int(self.recipe["epochs"])
        if done >= requested or self.facts.get("stopped_early"):
            return None
        return done, requested

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics of each epoch; none before the first is complete."""
        path = self.path / METRICS
        return read_metrics(path) if path.is_file() else []

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The pictures that could not be read, each with the reason."""
        with open(
            self.path / SKIPPED, newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            return [(row["path"], row["reason"]) for row in csv.DictReader(file)]

    @property
    def split(self) -> Split:
        """The training and validation pictures."""
        found = find_pictures(self.path / SPLIT, targets=self.task.known_targets())
        if list(found.labels) != self.labels:
            raise ValueError(
                f"{self.path / SPLIT} has the labels {', '.join(found.labels)}; expected "
                f"those of {LABELS}: {', '.join(self.labels)}."
            )
        return found

    @property
    def adapter(self) -> Path:
        """The folder of the adapter."""
        folder = self.path / ADAPTER
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{self.path} has no adapter yet: no epoch of the training is complete. Resume "
                f"it with: tfimm-lora finetune --out {self.path} --resume"
            )
        return folder

    def _fact(self, name: str) -> Any:
        if name not in self.facts:
            raise ValueError(
                f"{self.path / CONFIG} has no {name} yet: the run was interrupted before "
                f"training. Resume it with: tfimm-lora finetune --out {self.path} --resume"
            )
        return self.facts[name]

    def model(self) -> Any:
        """Load the fine-tuned model: the base model with the adapter of the best epoch.

        Raises:
            FileNotFoundError: if the file of the base model does not exist any more, or no
                epoch is complete.
            ValueError: if the file of the base model has changed since the training.
        """
        adapter = self.adapter
        model = load_adapter(self.base(), adapter)
        record_task(model, self.task.record())  # adapters of earlier versions have none
        return model

    def base(self) -> Any:
        """Load the ordinary model that was fine-tuned.

        A model or weight file that was moved is looked for in the folder of the run, beside it
        and in the current folder.

        Raises:
            FileNotFoundError: if a file of the base model is not found.
            ValueError: if its weights are not those that the run was trained with.
        """
        recipe = dict(self.recipe)
        for name in ("model", "weights"):
            if _is_file(recipe, name):
                expected = self.facts.get("base_sha256") if name == _hashed(recipe) else None
                recipe[name] = find_moved_file(recipe[name], expected, self.path)
        kept = self.path / BASE_WEIGHTS
        if self.facts.get("base_in_run") and not kept.is_file():
            raise FileNotFoundError(
                f"{kept} does not exist; expected the weights of the model that the run was "
                "trained with, which were random. Copy the file from the original folder."
            )
        if kept.is_file() and not recipe["model"].startswith(TIMM):
            recipe["pretrained"] = False  # so that nothing is downloaded only to be replaced
        opened = open_recipe_base(recipe, len(self.labels))
        if kept.is_file():
            opened.model.load_weights(kept)
        self._check_weights(opened)
        return opened.model

    def _check_weights(self, opened: BaseModel) -> None:
        expected = self.facts.get("base_digest")
        if expected is None:
            return
        digest = base_digest(opened, bool(self.facts.get("base_in_run")))
        if digest != expected:
            raise ValueError(
                f"The weights of {self.recipe['model']} ({opened.weights}) are not those that "
                f"the run in {self.path} was trained with: their SHA-256 is {digest}; expected "
                f"{expected}. Restore the checkpoint in the cache, or the packages of "
                f"{CONFIG} (versions)."
            )


def open_recipe_base(recipe: Mapping[str, Any], classes: int) -> BaseModel:
    """Open the ordinary model of a recipe."""
    size = recipe["input_size"]
    has_weights = recipe["weights"] is not None or is_model_file(recipe["model"])
    return open_base_model(
        recipe["model"],
        classes=classes,
        pretrained=recipe["pretrained"] and not has_weights,
        weights=recipe["weights"],
        input_size=tuple(size) if size else None,
        normalisation=recipe["normalisation"],
        dense=task_named(recipe.get("task", DEFAULT)).is_dense,
    )


def _is_file(recipe: Mapping[str, Any], name: str) -> bool:
    value = recipe[name]
    return value is not None and (name == "weights" or is_model_file(value))


def _hashed(recipe: Mapping[str, Any]) -> str:
    return "weights" if recipe["weights"] else "model"


def base_hash(recipe: Mapping[str, Any]) -> str | None:
    """The SHA-256 of the model or weight file of a recipe; None if it has no file."""
    name = _hashed(recipe)
    return file_hash(recipe[name]) if _is_file(recipe, name) else None


def base_digest(base: BaseModel, stored: bool) -> str:
    """The SHA-256 of the weights of a base model, without a classifier that is random.

    Args:
        base: The model.
        stored: Whether the run contains all its weights, so that none is random later.
    """
    return weights_digest(base.model, without_classifier=base.new_classifier and not stored)


def search_summary(folder: Path) -> dict[str, Any] | None:
    """What a complete search for settings in the folder of a run found; None without one."""
    path = folder / TUNING / SEARCH
    if not path.is_file():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))[SUMMARY]
    return summary


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file that contains a mapping."""
    yaml = require("yaml", extra="cli", why="A config in YAML")
    try:
        read = read_yaml_text(Path(path).read_text(encoding="utf-8"), "A config in YAML")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} contains a {type(read).__name__}; expected a mapping.")
    return read


def split_text(split: Split) -> str:
    """A CSV file with the path, targets and part of each picture, for ``find_pictures``."""
    rows = []
    names = split.targets.cells(split.train.pictures[0].label, split.labels)
    for name, part in split.parts().items():
        for picture in part.pictures:
            cells = split.targets.cells(picture.label, split.labels)
            rows.append((os.path.abspath(picture.path), *cells.values(), name))
    return _csv_text((PATH, *names, SPLIT_COLUMN), rows)


def _csv_text(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([names, *rows])
    return text.getvalue()


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder of a run within this block.

    Creates the folder; it is removed again if nothing is written to it.

    Raises:
        RuntimeError: if another process writes to the folder.
    """
    filelock = require("filelock", extra="cli", why="Writing a run")
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RuntimeError(
            f"Received out={str(folder)!r}, to which another process is writing; expected a "
            "folder that is not in use. Wait for it to end, or pass another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()
        if not existed and is_new(folder):
            shutil.rmtree(folder)


def is_new(folder: Path) -> bool:
    """Whether a folder does not exist or has nothing in it but the lock of a run."""
    return not folder.exists() or (
        folder.is_dir() and all(path.name == LOCK for path in folder.iterdir())
    )
