"""``Run``: the folder that a fine-tuning leaves, and the model in it."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.finetuning.base_model import Base, file_hash, open_base
from tfimm_lora.finetuning.checkpoint import write_whole
from tfimm_lora.finetuning.data.dataset import Split, find_pictures
from tfimm_lora.finetuning.data.pictures import Problem
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.metrics_csv import read_metrics
from tfimm_lora.finetuning.training import ADAPTER, METRICS
from tfimm_lora.utils.optional_imports import require

CONFIG, LABELS, SPLIT, SKIPPED = "config.yaml", "labels.txt", "split.csv", "skipped.csv"
BASE_WEIGHTS = "base.weights.h5"
#: Parts of the config: what was asked for, and what came of it.
RECIPE, FACTS = "recipe", "facts"


@dataclass(frozen=True)
class Run:
    """The folder of a fine-tuning, as ``tfimm-lora finetune --out`` writes it.

    Example:
        >>> from tfimm_lora.finetuning.run import Run
        >>> Run.open("no/such/run")
        Traceback (most recent call last):
        FileNotFoundError: no/such/run is no run of finetune: it has no config.yaml.
    """

    path: Path
    config: dict[str, Any]

    # -- making ------------------------------------------------------------------------

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
        """Begin a run: write what is known before training, ``config.yaml`` as the last.

        ``base_weights`` is a weight file of the ordinary model, where nobody could make its
        weights again.
        """
        run = cls(Path(path), {RECIPE: dict(recipe), FACTS: facts})
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.path / LABELS, "".join(f"{label}\n" for label in split.labels))
        _write_csv(
            run.path / SPLIT,
            ("path", "label", "split"),
            [
                (os.path.abspath(picture.path), split.labels[picture.label], part)
                for part, pictures in (("train", split.train), ("val", split.val))
                for picture in pictures.pictures
            ],
        )
        bad = [(x.path, x.reason) for x in skipped]
        _write_csv(run.path / SKIPPED, ("path", "reason"), bad)
        if base_weights is not None:
            shutil.copyfile(base_weights, run.path / BASE_WEIGHTS)
        run.save()
        return run

    def tell(self, **facts: Any) -> None:
        """Add to what came of the run, and write it."""
        self.config[FACTS].update(facts)
        self.save()

    def save(self) -> None:
        """Write ``config.yaml``."""
        yaml = require("yaml", extra="cli", why="config.yaml")
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        write_whole(self.path / CONFIG, text)

    # -- reading -----------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Read a run.

        Raises:
            FileNotFoundError: if the folder is none.
            ValueError: if its config cannot be read.
        """
        folder = Path(path)
        config = folder / CONFIG
        if not config.is_file():
            raise FileNotFoundError(f"{folder} is no run of finetune: it has no {CONFIG}.")
        read = read_yaml(config)
        if not isinstance(read.get(RECIPE), dict) or not isinstance(read.get(FACTS), dict):
            raise ValueError(
                f"{config} is no config of a run: expected the parts {RECIPE} and {FACTS}."
            )
        return cls(folder, read)

    @property
    def recipe(self) -> dict[str, Any]:
        """What was asked for."""
        return self.config[RECIPE]

    @property
    def facts(self) -> dict[str, Any]:
        """What came of it: parameters, seconds, best epoch, versions, ..."""
        return self.config[FACTS]

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the model's outputs."""
        return (self.path / LABELS).read_text(encoding="utf-8").splitlines()

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become the model's input."""
        return Preprocessing.from_dict(self._fact("preprocessing"))

    @property
    def history(self) -> list[dict[str, float]]:
        """The numbers of each epoch."""
        return read_metrics(self.path / METRICS)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Pictures that could not be read, and why."""
        with open(
            self.path / SKIPPED, newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:
            return [(row["path"], row["reason"]) for row in csv.DictReader(file)]

    @property
    def split(self) -> Split:
        """The pictures that were trained on and those that were kept for validation."""
        found = find_pictures(self.path / SPLIT)
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
                f"{self.path} has no adapter yet: no epoch of the training was finished. Go on "
                f"with: tfimm-lora finetune --out {self.path} --resume"
            )
        return folder

    def _fact(self, name: str) -> Any:
        if name not in self.facts:
            raise ValueError(
                f"{self.path / CONFIG} does not tell {name} yet: the run was interrupted "
                f"before training. Go on with: tfimm-lora finetune --out {self.path} --resume"
            )
        return self.facts[name]

    def model(self) -> Any:
        """The fine-tuned model: the base, with the adapter of the best epoch in it.

        Raises:
            FileNotFoundError: if the base's file is gone, or nothing was trained yet.
            ValueError: if the base's file is another one than then.
        """
        adapter = self.adapter
        model = self.base()
        return load_adapter(model, adapter)

    def base(self) -> Any:
        """The ordinary model that was fine-tuned."""
        base = open_recipe_base(self.recipe, len(self.labels)).model
        then, now = self.facts.get("base_sha256"), base_hash(self.recipe)
        if then != now:
            raise ValueError(
                f"The file of the model {self.recipe['model']} is another one than that "
                f"which was fine-tuned: SHA-256 {now}, then {then}. Put the old one back."
            )
        if (self.path / BASE_WEIGHTS).is_file():
            base.load_weights(self.path / BASE_WEIGHTS)
        return base


def open_recipe_base(recipe: Mapping[str, Any], classes: int) -> Base:
    """The ordinary model that a recipe asks for."""
    size = recipe["input_size"]
    return open_base(
        recipe["model"],
        classes=classes,
        pretrained=recipe["pretrained"],
        weights=recipe["weights"],
        input_size=tuple(size) if size else None,
        normalisation=recipe["normalisation"],
    )


def base_hash(recipe: Mapping[str, Any]) -> str | None:
    """SHA-256 of the file that a recipe's model comes from, if it comes from one."""
    path = recipe["weights"] or recipe["model"]
    return file_hash(path) if os.path.exists(path) else None


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    yaml = require("yaml", extra="cli", why="A config in YAML")
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds {type(read).__name__}; expected a mapping of names.")
    return read


def _write_csv(path: Path, names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([names, *rows])
    write_whole(path, text.getvalue())
