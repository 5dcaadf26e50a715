"""Checkpoints of a training after each epoch, written atomically."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.utils.atomic_files import write_file
from tfimm_lora.utils.optional_imports import require

_NAME = "epoch-{:05d}.safetensors"
_PATTERN = re.compile(r"epoch-(\d{5})\.safetensors")


@dataclass
class Progress:
    """The progress of a training, as plain data.

    Attributes:
        epoch: The number of completed epochs.
        history: The metrics of each epoch.
        best: The index of the best epoch, from 0; None before the first epoch.
        fingerprint: The settings that must not change when the training is resumed.
    """

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)


def changing_variables(model: Any) -> dict[str, Any]:
    """The variables that training can change, by name.

    These are the trained variables, the statistics of fully trained layers and the states of
    random generators. All variables that LoRA added are included, since their initial values
    are random or depend on data.
    """
    backend = backend_of(model)
    named: dict[str, Any] = {}
    for path, layer in backend.walk(model):
        variables = backend.own_variables(layer)
        if isinstance(layer, (LoRALayer, FrozenLayer)):
            added = layer._lora_variables() if isinstance(layer, LoRALayer) else {}
            kept = {id(v) for v in added.values()}
            variables = [v for v in variables if id(v) in kept or layer._is_trained(v)]
        for variable in [*variables, *backend.random_states(layer)]:
            name = f"{path}/{backend.variable_name(variable)}"
            while name in named:
                name += "+"
            named[name] = variable
    return named


def values_of(model: Any, optimizer: Any) -> dict[str, np.ndarray]:
    """The values of all variables of model and optimizer that a training step changes.

    Without an optimizer, only those of the model.
    """
    backend = backend_of(model)
    named = {f"model/{k}": v for k, v in changing_variables(model).items()}
    if optimizer is not None:
        named.update(_numbered(backend, optimizer))
    return {name: np.asarray(backend.to_numpy(v)) for name, v in named.items()}


def restore_values(model: Any, optimizer: Any, values: dict[str, np.ndarray]) -> None:
    """Restore the result of ``values_of``; without an optimizer, only the model.

    Raises:
        ValueError: if the values do not fit the model and optimizer.
    """
    backend = backend_of(model)
    named = {f"model/{k}": v for k, v in changing_variables(model).items()}
    if optimizer is not None:
        named.update(_numbered(backend, optimizer))
    wrong = [
        name
        for name, variable in named.items()
        if name not in values or tuple(variable.shape) != values[name].shape
    ]
    if wrong:
        raise ValueError(
            f"The checkpoint does not fit the model: {len(wrong)} values are missing or have "
            f"another shape, {', '.join(wrong[:5])}. Resume with the same model, lora_* "
            "arguments and optimizer as before."
        )
    for name, variable in named.items():
        variable.assign(values[name])


def _numbered(backend: Backend, optimizer: Any) -> dict[str, Any]:
    return {f"optimizer/{i}": v for i, v in enumerate(backend.optimizer_variables(optimizer))}


class TrainingCheckpoints:
    """A folder with the checkpoints of the last epoch and of the best epoch.

    Each checkpoint is one file that is written atomically. So the last one is always complete;
    it contains the index of the best epoch, whose checkpoint was written before it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        require("safetensors.numpy", extra="cli", why="Saving checkpoints")

    def save(self, progress: Progress, values: dict[str, np.ndarray]) -> None:
        """Write the checkpoint of an epoch and delete those that are no longer needed."""
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"progress": json.dumps(vars(progress))}
        contiguous = {k: np.asarray(v, order="C") for k, v in values.items()}
        path = self.path(progress.epoch - 1)
        write_file(path, save(contiguous, metadata=metadata))
        for epoch, old in self._files().items():
            if epoch not in (progress.epoch - 1, progress.best):
                old.unlink(missing_ok=True)

    def last(self) -> Progress | None:
        """The progress of the last checkpoint; None if there is no checkpoint."""
        from safetensors import safe_open

        files = self._files()
        if not files:
            return None
        path = files[max(files)]
        try:
            with safe_open(path, framework="numpy") as opened:
                return Progress(**json.loads(opened.metadata()["progress"]))
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint: {error}. Delete it to resume from the "
                "previous checkpoint, if there is one, or start again in another folder."
            ) from error

    def values(self, epoch: int) -> dict[str, np.ndarray]:
        """The values after the epoch with this index, from 0."""
        from safetensors.numpy import load_file

        return load_file(self.path(epoch))

    def path(self, epoch: int) -> Path:
        """The checkpoint file of the epoch with this index."""
        return self.folder / _NAME.format(epoch)

    def _files(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        named = ((_PATTERN.fullmatch(p.name), p) for p in self.folder.iterdir())
        return {int(match[1]): path for match, path in named if match}
