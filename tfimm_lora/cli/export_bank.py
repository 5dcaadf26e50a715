"""Export several runs of one base model to one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.bank.bank import AdapterBank
from tfimm_lora.cli.app import import_tensorflow, note
from tfimm_lora.cli.unfinished import warn_if_unfinished
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.shared_base import SharedBase


class OpenedBank(NamedTuple):
    """A bank with the adapters of runs, and the preprocessing that they have in common."""

    bank: Any
    preprocessing: Preprocessing


def require_none(options: dict[str, Any]) -> None:
    """Raise if options of a single run are given with several.

    Args:
        options: Option -> its value, or None.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"Received {' and '.join(given)} with several runs; expected none of them. Export "
            "each run to a file of its own."
        )


def open_runs(paths: list[Path]) -> OpenedBank:
    """Open the base model of several runs with all their adapters.

    An adapter has the name of the folder of its run.

    Raises:
        FileNotFoundError: if one is not a run, or has no adapter yet.
        ValueError: if two have the same name, or their base models, picture sizes or
            preprocessing differ. The message names all of them.
    """
    runs = {path.absolute().name: Run.open(path) for path in paths}
    if len(runs) < len(paths):
        raise ValueError(
            f"Received the runs {', '.join(map(str, paths))}, some of which have the same "
            "name; expected different ones: adapters have the names of the folders."
        )
    for run in runs.values():
        warn_if_unfinished(run)
    adapters = {name: Adapter.load(run.adapter) for name, run in runs.items()}
    import_tensorflow()
    first, *others = runs.values()
    base = SharedBase.of_run(first)
    problems = [
        f"{run.path}: {'; '.join(found)}" for run in others if (found := base.differences(run))
    ]
    if problems:
        raise ValueError(
            f"Received runs of another base model than {first.path}: {'. '.join(problems)}. "
            "One file has one base model: export the others apart."
        )
    if not base.has_classifier:
        note("without an adapter the classifier is new and not trained")
    bank = AdapterBank(base.model, adapters, capacity=len(adapters))
    for name, run in runs.items():
        bank.load(name, adapters[name], labels=run.labels)
    return OpenedBank(bank, base.preprocessing)
