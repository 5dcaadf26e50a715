"""Which model a name, a folder or a repository stands for, and where its weights are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from tfimm_lora.zoo.keras3_models.folders import folder_config, folder_kind
from tfimm_lora.zoo.keras3_models.known import KnownModel3, is_known, known
from tfimm_lora.zoo.keras3_models.presets import repository_of
from tfimm_lora.zoo.keras3_models.transformers_models import of_transformers
from tfimm_lora.zoo.weights.checkpoint import repository_config


class Source(NamedTuple):
    """A model that ``build`` can create.

    Attributes:
        model: The model.
        weights: The folder or the id of the repository with its weights; None for a name.
    """

    model: KnownModel3
    weights: str | None


def find_source(name: str | os.PathLike[str], *, download: bool = True) -> Source | None:
    """Return the model of a name, a folder of timm or transformers, or a repository.

    Args:
        name: As for ``create_base``.
        download: Whether to download the config.json of a repository on the hub.

    Returns:
        The model, or None if ``build`` cannot create it: it may be a preset for keras_hub.

    Raises:
        ValueError: If the model has settings that Keras 3 cannot build.
        FileNotFoundError, PermissionError, ConnectionError: As ``load_timm_weights``.
    """
    name = os.fspath(name)
    if is_known(name):
        return Source(known(name), None)
    kind = folder_kind(name)
    if kind in ("timm", "transformers"):
        found = _of_config(Path(name).resolve().name, folder_config(name))
        return None if found is None else Source(found, name)
    repository = repository_of(name)
    if repository is None or kind is not None or not download:
        return None
    found = _of_config(name, repository_config(repository))
    return None if found is None else Source(found, repository)


def _of_config(name: str, config: dict[str, Any]) -> KnownModel3 | None:
    architecture = config.get("architecture")
    if isinstance(architecture, str) and is_known(architecture):
        return known(architecture)
    return of_transformers(name, config)
