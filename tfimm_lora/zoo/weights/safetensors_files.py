"""The tensors of a checkpoint in one or several safetensors files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: safetensors' names of the types that weights may have. 8 bits need scales as well.
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensors:
    """Headers first, values on demand. Use as a context manager.

    Args:
        files: The files, each with tensors of its own.

    Raises:
        ValueError: for a file that is not safetensors or is cut off, and for a tensor that
            is in two files.
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
                            f"Received {[str(f) for f in files]}, of which two hold the "
                            f"tensor {key!r}; expected it once."
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
        """The value of a tensor of floats, in the type that it is stored in."""
        return self._handles[key].get_tensor(key)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"Received {str(path)!r}, which is not a whole safetensors file ({error}); it "
            "may have been cut off. Get it again."
        ) from error
