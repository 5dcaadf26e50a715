"""What kind of model a folder contains, by its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

FolderKind = Literal["keras_hub", "transformers", "timm", "saved_model", "adapter"]

#: The kinds that keras_hub reads.
PRESETS = ("keras_hub", "transformers", "timm")


def folder_kind(path: str | os.PathLike[str]) -> FolderKind | None:
    """Return the kind of a folder; None if it is not a folder or contains no model.

    "keras_hub" is a preset of keras_hub, "transformers" and "timm" are what these libraries
    save or the hub has for them, "saved_model" is a SavedModel of TensorFlow, and "adapter"
    has the files of an adapter only.
    """
    folder = Path(path)
    config = folder_config(folder)
    if "registered_name" in config:
        return "keras_hub"
    if "model_type" in config:
        return "transformers"
    if "architecture" in config:
        return "timm"
    if (folder / "saved_model.pb").exists():
        return "saved_model"
    return "adapter" if (folder / "adapter_config.json").exists() else None


def folder_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config.json of a folder; empty if there is none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
