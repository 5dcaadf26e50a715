"""``Exported``: what ``export`` wrote, as a value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output of a file; a size of None may be any, as the batch's always is."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Exported:
    """A file (or the folder of a SavedModel) whose outputs were found to be the model's.

    Args:
        path: Where it is.
        format: "keras", "savedmodel", "tflite" or "onnx".
        bytes: Its size, without the description beside it.
        difference: The largest difference from the model's outputs that was seen, relative to
            the largest output.
        inputs: What it takes, by name.
        outputs: What it gives, by name.
        quantize: None, "float16", "dynamic" or "int8".
        agreement: For "int8", the share of samples whose top class is the model's.
        needs: For a Keras file, the Python packages that loading it takes.
    """

    path: Path
    format: str
    bytes: int
    difference: float
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    quantize: str | None = None
    agreement: float | None = None
    needs: tuple[str, ...] = ()

    @property
    def description(self) -> Path:
        """The JSON file beside it, with labels and preprocessing."""
        return description_path(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def description_path(path: Path) -> Path:
    """Where the description of a file is: its whole name and ".json".

    Example:
        >>> from pathlib import Path
        >>> description_path(Path("out/cats.onnx")).name
        'cats.onnx.json'
    """
    return path.with_name(f"{path.name}.json")
