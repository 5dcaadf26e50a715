"""``Exported``: the result of ``export``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a file. Sizes of None, such as the batch size, are arbitrary."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Exported:
    """An exported file (or SavedModel folder) whose outputs match those of the model.

    Args:
        path: The path of the file.
        format: "keras", "savedmodel", "tflite" or "onnx".
        bytes: The size of the file, without its description.
        difference: The largest measured difference from the outputs of the model, relative to
            the largest output.
        inputs: The inputs of the file.
        outputs: The outputs of the file.
        quantize: None, "float16", "dynamic" or "int8".
        agreement: For "int8", the share of samples with the same top class as the model.
        needs: For a Keras file, the Python packages that are needed to load it.
        returns: "logits", "probabilities", "numbers" (of a regression, in the units of its
            targets), or None if it is not known.
        open_with: For a Keras file, how to open it: "keras" and "packages" (names and
            versions), "environment" (variables to set before Python is started) and "code".
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
    returns: str | None = None
    open_with: dict[str, Any] | None = None

    @property
    def description(self) -> Path:
        """The JSON file beside the exported file, with labels and preprocessing."""
        return description_path(self.path)

    def to_dict(self) -> dict[str, Any]:
        """The attributes as plain values, for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def description_path(path: Path) -> Path:
    """The path of the description of a file: its full name with ".json" appended.

    Example:
        >>> from pathlib import Path
        >>> description_path(Path("out/cats.onnx")).name
        'cats.onnx.json'
    """
    return path.with_name(f"{path.name}.json")


def size_of(path: Path) -> int:
    """The size of a file, or of all files in a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
