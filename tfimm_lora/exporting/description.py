"""What is written beside a file: what it takes and gives, its labels, the preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfimm_lora.exporting.exported import Exported, description_path
from tfimm_lora.version import __version__


def described(
    exported: Exported,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    included: bool,
) -> dict[str, Any]:
    """The description of a file, as plain values.

    Args:
        exported: What was written.
        labels: Names of the classes, or None.
        preprocessing: Plain values, or None.
        included: Whether the file does the preprocessing itself.
    """
    values = exported.to_dict()
    return {
        **{name: values[name] for name in ("format", "quantize", "inputs", "outputs")},
        "labels": None if labels is None else list(labels),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "preprocessing_included": included,
        "needs": list(exported.needs),
        "difference": exported.difference,
        "made_by": f"tfimm_lora {__version__}",
    }


def read_description(path: Path) -> dict[str, Any]:
    """The description beside a file, or an empty one.

    Raises:
        ValueError: if what is there is no description.
    """
    beside = description_path(path)
    if not beside.is_file():
        return {}
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}. Mend or remove it.") from error
    return values if isinstance(values, dict) else {}


def properties(
    labels: Sequence[str] | None, preprocessing: Mapping[str, Any] | None, included: bool
) -> dict[str, str]:
    """The same for the metadata of an ONNX file, where every value is a text."""
    values = {
        "labels": None if labels is None else list(labels),
        "preprocessing": preprocessing,
    }
    given = {name: json.dumps(value) for name, value in values.items() if value is not None}
    return {**given, "preprocessing_included": json.dumps(included)}
