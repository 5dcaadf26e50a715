"""Where adapters are that have no slot at the moment: in host memory, or in files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class _Stored(NamedTuple):
    """A slot without its empty pages."""

    #: The numbers of the pages that are not empty.
    pages: np.ndarray
    #: Their values, or the file with them.
    values: np.ndarray | Path


class Overflow:
    """The slots of adapters by name, without their empty pages.

    Args:
        pages: The number of pages of a slot.
        folder: A folder for files, one for each adapter; None keeps them in host memory.
    """

    def __init__(self, pages: int, folder: str | os.PathLike[str] | None) -> None:
        self._pages = pages
        self._folder = None
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            # Of its own, so that banks can share a folder. It is removed with the bank.
            self._folder = tempfile.TemporaryDirectory(prefix="bank-", dir=folder)
        self._stored: dict[str, _Stored] = {}
        self._written = 0

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def put(self, name: str, slot: np.ndarray) -> None:
        """Store the slot of an adapter, (pages, PAGE)."""
        pages = np.flatnonzero(slot.any(axis=1))
        self.drop(name)
        if self._folder is None:
            self._stored[name] = _Stored(pages, slot[pages])
            return
        path = Path(self._folder.name) / f"{self._written}.npy"
        self._written += 1
        np.save(path, slot[pages], allow_pickle=False)
        self._stored[name] = _Stored(pages, path)

    def get(self, name: str) -> np.ndarray:
        """Return the slot of an adapter."""
        pages, values = self._stored[name]
        if isinstance(values, Path):
            values = np.load(values, allow_pickle=False)
        slot = np.zeros((self._pages, values.shape[1]), "float32")
        slot[pages] = values
        return slot

    def take(self, name: str) -> np.ndarray:
        """Return the slot of an adapter, which is stored no longer."""
        slot = self.get(name)
        self.drop(name)
        return slot

    def drop(self, name: str) -> None:
        """Forget an adapter, if it is stored."""
        stored = self._stored.pop(name, None)
        if stored is not None and isinstance(stored.values, Path):
            stored.values.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files."""
        self._stored = {}
        if self._folder is not None:
            self._folder.cleanup()
