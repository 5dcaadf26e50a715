"""Where adapters are that have no slot at the moment: in host memory, or in files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class _Stored(NamedTuple):
    """A slot without its empty pages."""

    #: The number of all pages.
    total: int
    #: The numbers of the pages that are not empty.
    pages: np.ndarray
    #: Their values, or the file with them.
    values: np.ndarray | Path


class Overflow:
    """The slots of adapters by name, without their empty pages.

    Args:
        folder: A folder for files, one for each adapter; None keeps them in host memory.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        self._folder = folder
        #: In the folder, so that banks can share it. It is removed with the bank.
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._stored: dict[str, _Stored] = {}
        self._written = 0

    def put(self, name: str, slot: np.ndarray) -> None:
        """Store the slot of an adapter, (pages, PAGE)."""
        pages = np.flatnonzero(slot.any(axis=1))
        if self._folder is None:
            self._stored[name] = _Stored(len(slot), pages, slot[pages])
            return
        if self._own_folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="bank-", dir=self._folder)
        path = Path(self._own_folder.name) / f"{self._written}.npy"
        self._written += 1
        np.save(path, slot[pages], allow_pickle=False)
        self._stored[name] = _Stored(len(slot), pages, path)

    def get(self, name: str) -> np.ndarray:
        """Return the slot of an adapter that is stored."""
        total, pages, values = self._stored[name]
        if isinstance(values, Path):
            values = np.load(values, allow_pickle=False)
        slot = np.zeros((total, values.shape[1]), "float32")
        slot[pages] = values
        return slot

    def drop(self, name: str) -> None:
        """Forget an adapter, if it is stored."""
        stored = self._stored.pop(name, None)
        if stored is not None and isinstance(stored.values, Path):
            stored.values.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files."""
        self._stored = {}
        if self._own_folder is not None:
            self._own_folder.cleanup()
