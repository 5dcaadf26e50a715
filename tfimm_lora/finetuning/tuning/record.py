"""``Tuned``: what a search found, and its files in the folder of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfimm_lora.finetuning.monitor import is_minimized
from tfimm_lora.finetuning.run import SEARCH, SUMMARY, TUNING
from tfimm_lora.utils.atomic_files import write_file

if TYPE_CHECKING:
    from tfimm_lora.finetuning.recipe import Recipe

#: The files of a search, beside its result.
JOURNAL, TABLE = "journal.log", "trials.csv"
_SETTINGS = "settings"


@dataclass(frozen=True)
class TunedTrial:
    """One training of a search.

    Attributes:
        number: The number of the trial in its storage.
        learning_rate, rank: The settings.
        epochs: The epochs of its complete schedule.
        value: The monitored metric of its best epoch; None if the training diverged.
        metrics: All metrics of that epoch.
        seconds: The time that it took.
        worker: The machine and process that trained it.
    """

    number: int
    learning_rate: float
    rank: int
    epochs: int
    value: float | None
    metrics: dict[str, float]
    seconds: float
    worker: str


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        learning_rate, rank: The settings that were chosen.
        monitor: The metric by which they were chosen, such as "val_loss".
        trials: The trainings, in the order of their numbers.
        rates: The range of rates, or the same number twice if the rate was not searched.
        ranks: The ranks that were searched.
        epochs: The epochs of the full training that the search is for.
        pictures: The numbers of pictures for training and for comparison; None if not known.
        recipe: The recipe with the chosen settings, from ``tune_pictures``.
    """

    learning_rate: float
    rank: int
    monitor: str
    trials: tuple[TunedTrial, ...]
    rates: tuple[float, float]
    ranks: tuple[int, ...]
    epochs: int
    pictures: tuple[int, int] | None = None
    recipe: Recipe | None = None

    @property
    def seconds(self) -> float:
        """The time of all trainings together."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def epochs_trained(self) -> int:
        """The epochs of all trainings together."""
        return sum(trial.epochs for trial in self.trials)

    @property
    def best(self) -> TunedTrial:
        """The training that decided."""
        return best_trial(self.trials, self.monitor)

    def to_dict(self) -> dict[str, Any]:
        """All but the recipe, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["trials"] = [dataclasses.asdict(trial) for trial in self.trials]
        del values["recipe"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tuned:
        """Create it from the result of ``to_dict``."""
        names = {f.name for f in dataclasses.fields(cls)}
        named = {k: v for k, v in values.items() if k in names}
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in named.items()
        }
        given["trials"] = tuple(TunedTrial(**trial) for trial in values["trials"])
        return cls(**given)

    def summary(self) -> dict[str, Any]:
        """The facts for ``config.yaml``."""
        return {
            "learning_rate": self.learning_rate,
            "rank": self.rank,
            "rates": list(self.rates),
            "ranks": list(self.ranks),
            "monitor": self.monitor,
            "value": self.best.value,
            "trials": len(self.trials),
            "epochs": self.epochs_trained,
            "seconds": round(self.seconds, 1),
        }

    def write(self, run: Path, settings: Mapping[str, Any]) -> None:
        """Write ``search.json`` and ``trials.csv`` into the folder of a run.

        ``settings`` is what has to be the same when the run is resumed.
        """
        folder = run / TUNING
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        metrics = list(dict.fromkeys(name for trial in self.trials for name in trial.metrics))
        names = ["number", "learning_rate", "rank", "epochs", "value", "seconds", "worker"]
        table.writerow([*names, *metrics])
        for trial in self.trials:
            values = [getattr(trial, name) for name in names]
            table.writerow([*values, *(trial.metrics.get(name) for name in metrics)])
        write_file(folder / TABLE, text.getvalue())
        # The last one: it says that the search is complete.
        result = {SUMMARY: self.summary(), _SETTINGS: dict(settings), **self.to_dict()}
        write_file(folder / SEARCH, json.dumps(result, indent=1) + "\n")


def read_search(run: Path) -> tuple[Tuned, dict[str, Any]] | None:
    """Read the search in the folder of a run and its settings; None if none is complete."""
    path = run / TUNING / SEARCH
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return Tuned.from_dict(values), values[_SETTINGS]


def worst_value(monitor: str) -> float:
    """The value of a training that diverged."""
    return math.inf if is_minimized(monitor) else -math.inf


def rank_key(trial: TunedTrial, monitor: str) -> tuple[float, ...]:
    """A key that sorts trials of the same length, the best first."""
    if trial.value is None:
        return (math.inf,)
    value = trial.value if is_minimized(monitor) else -trial.value
    # Accuracies on few pictures are often equal.
    return value, trial.metrics.get("val_loss", 0.0), trial.number


def best_trial(trials: tuple[TunedTrial, ...], monitor: str) -> TunedTrial:
    """The best of the longest trainings.

    Raises:
        FloatingPointError: if all diverged.
    """
    kept = [trial for trial in trials if trial.value is not None]
    if not kept:
        raise FloatingPointError(
            f"All {len(trials)} trainings of the search diverged. Search lower rates, or check "
            "the normalization of the inputs."
        )
    longest = max(trial.epochs for trial in kept)
    return min(
        (trial for trial in kept if trial.epochs == longest), key=lambda x: rank_key(x, monitor)
    )
