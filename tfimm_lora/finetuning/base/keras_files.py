"""Load saved Keras models, and say what is missing if that fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import zipfile
from typing import Any, NamedTuple

from tfimm_lora.backend import default_backend, installed, uses_legacy_keras
from tfimm_lora.backend.frameworks import LEGACY_SWITCH
from tfimm_lora.utils.optional_imports import require

#: Packages whose classes are registered when they are imported, and their names on PyPI.
_PACKAGES = {"keras_hub": "keras-hub", "keras_cv": "keras-cv", "tfimm": "tfimm"}


class SavedBy(NamedTuple):
    """What a .keras file says about the process that saved it.

    Attributes:
        legacy: Whether it was legacy Keras; None if the file does not say.
        version: The version of Keras, or "".
        packages: The packages whose classes are in the model.
    """

    legacy: bool | None
    version: str
    packages: tuple[str, ...]


def saved_by(path: str | os.PathLike[str]) -> SavedBy:
    """Read which Keras saved a .keras file, without loading the model."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = archive.read("config.json").decode()
            metadata = json.loads(archive.read("metadata.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return SavedBy(None, "", ())
    version = str(metadata.get("keras_version", "")) if isinstance(metadata, dict) else ""
    legacy = int(version[0]) < 3 if version[:1].isdigit() else None
    named = re.findall(r'"(?:registered_name|module)": "(\w+)[.>]', config)
    return SavedBy(legacy, version, tuple(p for p in _PACKAGES if p in named))


def check_saved_by(path: str | os.PathLike[str]) -> SavedBy:
    """Raise an error if a .keras file needs another Keras, or packages that are not installed.

    A file without classes of other packages may load in the other Keras, too, so it is tried.

    Raises:
        ImportError, ValueError: as ``load_keras_model``.
    """
    file = saved_by(path)
    if file.packages and _is_other_keras(file):
        raise _other_keras(os.fspath(path), file)
    for package in file.packages:
        if not installed(package):
            raise ImportError(
                f"{os.fspath(path)} contains classes of {_PACKAGES[package]}, which is not "
                f"installed. Install it with: pip install {_PACKAGES[package]}"
            )
    return file


def _is_other_keras(file: SavedBy) -> bool:
    return file.legacy is not None and file.legacy != uses_legacy_keras()


def load_keras_model(path: str | os.PathLike[str]) -> Any:
    """Load a saved Keras model of either Keras that this process can load.

    Args:
        path: A .keras or .h5 file, or the folder of a SavedModel for legacy Keras.

    Returns:
        The model, not compiled.

    Raises:
        ImportError: if a package is missing whose classes are in the model.
        ValueError: if the file cannot be loaded. The message says whether it needs the other
            Keras.
    """
    path = os.fspath(path)
    file, backend = check_saved_by(path), default_backend()
    for package in file.packages:
        require(package, extra="hub", why=path)
    other = f"{LEGACY_SWITCH}={0 if uses_legacy_keras() else 1}"
    try:
        return backend.keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises anything for files of another version
        if _is_other_keras(file):
            raise _other_keras(path, file) from error
        if os.path.isdir(path) and not uses_legacy_keras():
            raise ValueError(
                f"{path} is a folder, which Keras 3 cannot load as a model. A SavedModel of "
                f"legacy Keras needs tf_keras: set {LEGACY_SWITCH}=1."
            ) from error
        raise ValueError(
            f"{path} cannot be loaded by {backend.keras.__name__} "
            f"{backend.keras.__version__}: {error}"
            + ("" if file.version else f". If the other Keras wrote it, set {other}.")
        ) from error


def _other_keras(path: str, file: SavedBy) -> ValueError:
    # The version without importing Keras, which would take seconds.
    package = "tf_keras" if uses_legacy_keras() else "keras"
    here = f"{package} {importlib.metadata.version(package)}"
    needed, switch = ("legacy Keras (tf_keras)", 1) if file.legacy else ("Keras 3", 0)
    missing = " and install tf-keras" if file.legacy and not installed("tf_keras") else ""
    return ValueError(
        f"{path} was saved by {needed}, version {file.version}, but this process runs "
        f"{here}. Set the environment variable "
        f"{LEGACY_SWITCH}={switch}{missing}, and start again."
    )
