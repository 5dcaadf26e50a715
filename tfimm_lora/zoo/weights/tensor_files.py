"""Read the tensors of a checkpoint from one or several files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.zoo.weights.torch_files import TORCH_SUFFIXES, TorchFile

#: safetensors' names of the supported types. Types of 8 bits would need scales too.
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """The shapes and types of all tensors; values are read on demand.

    Use it as a context manager, which closes the files.

    Args:
        files: The files, which must have different tensors.

    Raises:
        ValueError: If a file is not a complete file of safetensors or torch, or two files
            have the same tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            for path in files:
                handle = stack.enter_context(_opened(path))
                for key in handle.keys():  # noqa: SIM118 (not a dict)
                    if key in self._handles:
                        raise ValueError(
                            f"Received {[str(f) for f in files]}, of which two have the "
                            f"tensor {key!r}; expected it in one of them."
                        )
                    header = handle.get_slice(key)
                    self._handles[key] = handle
                    self.shapes[key] = tuple(header.get_shape())
                    self.types[key] = header.get_dtype()
            self._stack = stack.pop_all()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def read(self, key: str) -> np.ndarray:
        """Return the value of a floating point tensor, in its stored type."""
        value: np.ndarray = self._handles[key].get_tensor(key)
        return value


def _opened(path: Path) -> Any:
    if path.suffix in TORCH_SUFFIXES:
        return TorchFile(path)
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"Received {str(path)!r}, which is not a complete safetensors file ({error}); it "
            "may be truncated. Get the file again."
        ) from error
