"""The state of a training between two epochs, in files that survive a kill at any time."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.utils.optional_imports import require

_NAME = "epoch-{:05d}.safetensors"
_PATTERN = re.compile(r"epoch-(\d{5})\.safetensors")


@dataclass
class Progress:
    """What is known after an epoch, besides values: plain data.

    Attributes:
        epoch: How many epochs are done.
        history: One dictionary of numbers for each.
        best: The number, from 0, of the epoch with the best value; None before one.
        fingerprint: What must be the same when the training goes on.
    """

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: int | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)


def changing_variables(model: Any) -> dict[str, Any]:
    """The variables that training can change, by name: trained ones, statistics of layers
    that are trained whole, and the states of random generators. And those that LoRA added,
    which come from chance or data before the first step."""
    backend = backend_of(model)
    found: dict[str, Any] = {}
    for path, layer in backend.walk(model):
        variables = backend.own_variables(layer)
        if isinstance(layer, (LoRALayer, FrozenLayer)):
            added = layer._lora_variables() if isinstance(layer, LoRALayer) else {}
            kept = {id(v) for v in added.values()}
            variables = [v for v in variables if id(v) in kept or layer._is_trained(v)]
        for variable in [*variables, *backend.random_states(layer)]:
            name = f"{path}/{backend.variable_name(variable)}"
            while name in found:
                name += "+"
            found[name] = variable
    return found


def values_of(model: Any, optimizer: Any) -> dict[str, np.ndarray]:
    """The values of everything that a step of training changes."""
    backend = backend_of(model)
    named = {f"model/{k}": v for k, v in changing_variables(model).items()}
    named.update(_numbered(backend, optimizer))
    return {name: np.asarray(backend.to_numpy(v)) for name, v in named.items()}


def give_values(model: Any, optimizer: Any, values: dict[str, np.ndarray]) -> None:
    """The reverse of ``values_of``; without an optimizer only the model's.

    Raises:
        ValueError: if they are not those of such a model and optimizer.
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
            f"The state does not fit the model: {len(wrong)} values are missing or have "
            f"another shape, {', '.join(wrong[:5])}. Go on with the model, the lora_* "
            "arguments and the optimizer that the training was started with."
        )
    for name, variable in named.items():
        variable.assign(values[name])


def _numbered(backend: Any, optimizer: Any) -> dict[str, Any]:
    return {f"optimizer/{i}": v for i, v in enumerate(backend.optimizer_variables(optimizer))}


class Checkpoints:
    """The folder with the state after the last epoch and after the best one.

    Each state is one file, renamed into place when it is whole. So the last whole one is
    always there, and it names the best, which was written before it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        require("safetensors.numpy", extra="cli", why="Saving the state of a training")

    def save(self, progress: Progress, values: dict[str, np.ndarray]) -> None:
        """Write the state after an epoch and drop those that nobody needs any more."""
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        told = {"progress": json.dumps(vars(progress))}
        contiguous = {k: np.asarray(v, order="C") for k, v in values.items()}
        path = self.path(progress.epoch - 1)
        write_whole(path, save(contiguous, metadata=told))
        for epoch, old in self._files().items():
            if epoch not in (progress.epoch - 1, progress.best):
                old.unlink(missing_ok=True)

    def last(self) -> Progress | None:
        """What is known of the last whole state; None where there is none."""
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
                f"{path} cannot be read as the state of a training: {error}. Delete it to go "
                "on from the state before it, if there is one, or start anew."
            ) from error

    def values(self, epoch: int) -> dict[str, np.ndarray]:
        """The values after an epoch, numbered from 0."""
        from safetensors.numpy import load_file

        return load_file(self.path(epoch))

    def path(self, epoch: int) -> Path:
        """The file of the state after an epoch."""
        return self.folder / _NAME.format(epoch)

    def _files(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        named = ((_PATTERN.fullmatch(p.name), p) for p in self.folder.iterdir())
        return {int(match[1]): path for match, path in named if match}


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is there whole or as it was before, whenever that ends."""
    # Names of files may be no UTF-8; Python gives their bytes as surrogates.
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
