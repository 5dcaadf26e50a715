"""The JSON description beside an exported file: inputs, outputs, labels, preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfimm_lora.exporting.exported import Exported, description_path
from tfimm_lora.version import __version__


def describe(
    exported: Exported,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    included: bool,
    task: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The description of a file as plain values.

    Args:
        exported: The exported file.
        labels: The names of the classes, or None.
        preprocessing: The preprocessing as plain values, or None.
        included: Whether the file includes the preprocessing.
        task: What the model was fine-tuned for, as plain values, or None.
    """
    values = exported.to_dict()
    return {
        **{name: values[name] for name in ("format", "quantize", "inputs", "outputs")},
        "returns": exported.returns,
        "labels": None if labels is None else list(labels),
        "task": None if task is None else dict(task),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "preprocessing_included": included,
        "needs": list(exported.needs),
        "open_with": exported.open_with,
        "difference": exported.difference,
        "made_by": f"tfimm_lora {__version__}",
    }


def read_description(path: Path) -> dict[str, Any]:
    """Read the description of a file; an empty one if there is none.

    Raises:
        ValueError: if the description is not valid JSON.
    """
    description = description_path(path)
    if not description.is_file():
        return {}
    try:
        values = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{description} is not valid JSON: {error}. Correct or delete it."
        ) from error
    return values if isinstance(values, dict) else {}


def file_metadata(
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    included: bool,
    returns: str | None,
    task: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The metadata inside a file. The values are texts in JSON, as ONNX requires texts."""
    values = {
        "returns": returns,
        "labels": None if labels is None else list(labels),
        "task": task,
        "preprocessing": preprocessing,
    }
    texts = {name: json.dumps(value) for name, value in values.items() if value is not None}
    return {**texts, "preprocessing_included": json.dumps(included)}
