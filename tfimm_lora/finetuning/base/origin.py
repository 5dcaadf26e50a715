"""Recognize the base model of a run again: digests of weights and files, and moved files."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.model.classifier import classifier_paths


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, or of all files in a folder and their names."""
    digest = hashlib.sha256()
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for file in files:
        if file != root:
            digest.update(file.relative_to(root).as_posix().encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weights_digest(model: Any, *, without_classifier: bool) -> str:
    """The SHA-256 of the floating-point weights of a model, in the order of its layers.

    Names are not included, because the names of layers depend on what a process created
    before. Weights that tfimm resamples for another input size are not included, because the
    rounding of that depends on the device.

    Args:
        model: An ordinary model.
        without_classifier: Whether to leave out the classifier, for one that is random.
    """
    backend, digest = backend_of(model), hashlib.sha256()
    left_out = classifier_paths(model) if without_classifier else []
    resampled = getattr(getattr(model, "cfg", None), "transform_weights", None) or {}
    for path, layer in backend.walk(model):
        if any(path == head or path.startswith(f"{head}/") for head in left_out):
            continue
        for variable in backend.own_variables(layer):
            name = backend.variable_name(variable)
            if (f"{path}/{name}" if path else name) in resampled:
                continue
            value = backend.to_numpy(variable)
            if value.dtype.kind in "iub":  # the state of random generators, and counters
                continue
            digest.update(f"{value.shape}{value.dtype}".encode())
            digest.update(value.tobytes())
    return digest.hexdigest()


def find_moved_file(path: str, expected: str | None, run: Path) -> str:
    """The file that a run was trained with: at its path, or moved to a place beside the run.

    Args:
        path: The path at the time of training.
        expected: The SHA-256 of the file; None accepts any file at ``path``.
        run: The folder of the run. The file is also looked for in this folder, in the one that
            contains it, and in the current folder.

    Raises:
        FileNotFoundError: if there is no file of this name.
        ValueError: if there is one, but with other content.

    Warns:
        UserWarning: if the file is found at another place.
    """
    name = os.path.basename(path)
    places = [Path(path), run / name, run.resolve().parent / name, Path.cwd() / name]
    found = [place for place in _distinct(places) if place.exists()]
    if expected is None:
        if found and found[0] == Path(path):
            return path
        found = []
    for place in found:
        if file_hash(place) == expected:
            if place != Path(path):
                warnings.warn(
                    f"{path} does not exist or has changed. Using {place}, which has the same "
                    "SHA-256.",
                    stacklevel=2,
                )
            return str(place)
    looked = ", ".join(str(place) for place in _distinct(places))
    wanted = f"{name}, SHA-256 {expected}" if expected else name
    if found:
        raise ValueError(
            f"The file of the model has changed since it was fine-tuned: "
            f"{', '.join(f'{place} has the SHA-256 {file_hash(place)}' for place in found)}; "
            f"expected {wanted}. Restore the original file. Looked for it at: {looked}."
        )
    raise FileNotFoundError(
        f"The file of the model that was fine-tuned does not exist any more; expected "
        f"{wanted}. Copy it into the folder of the run. Looked for it at: {looked}."
    )


def _distinct(places: Iterable[Path]) -> list[Path]:
    return list({os.path.abspath(place): place for place in places}.values())
