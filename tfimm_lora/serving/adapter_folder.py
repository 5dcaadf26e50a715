"""``AdapterFolder``: a folder whose subfolders are the adapters that are served.

It is the only place where the adapters are kept. Every process that serves them reads it, so
an adapter that is added or removed in one of them is so in all.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.file_format import CARD, PENDING_CONFIG, WEIGHTS
from tfimm_lora.adapters.file_format import CONFIG as ADAPTER_CONFIG
from tfimm_lora.finetuning.run import CONFIG as RUN_CONFIG
from tfimm_lora.finetuning.run import LABELS, Run
from tfimm_lora.finetuning.training import ADAPTER
from tfimm_lora.utils.atomic_files import move_into_place, temporary_path
from tfimm_lora.utils.optional_imports import require

#: The name of an adapter, and of its folder. It cannot be a path, hidden, or look like another.
NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?"
NAME_IN_WORDS = (
    "1 to 100 of the characters A-Z, a-z, 0-9, '.', '_' and '-', beginning and ending with a "
    "letter or digit"
)

#: The files whose changes are noticed, of a run and of an adapter.
_FILES = (
    *(RUN_CONFIG, LABELS, ADAPTER_CONFIG, WEIGHTS),
    *(f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{WEIGHTS}"),
)

#: All that an uploaded adapter consists of.
_OWN_FILES = frozenset((ADAPTER_CONFIG, WEIGHTS, LABELS, CARD, PENDING_CONFIG))

_LOCK = ".lock"

#: Time of change, size and inode of each file; None for one that does not exist.
Version = tuple[tuple[int, int, int] | None, ...]


class NotRemovable(Exception):
    """A folder that contains more than an adapter."""


class Entry(NamedTuple):
    """What a subfolder contains: an adapter, its labels, and the run that it is of."""

    adapter: Adapter
    labels: tuple[str, ...] | None
    run: Run | None


def is_name(text: str) -> bool:
    """Whether a text may be the name of an adapter.

    Example:
        >>> from tfimm_lora.serving.adapter_folder import is_name
        >>> [is_name(x) for x in ("flowers-2.1", "", "..", "a/b", ".hidden", "r\u00f6se")]
        [True, False, False, False, False, False]
    """
    return re.fullmatch(NAME, text) is not None


class AdapterFolder:
    """A folder of adapters, shared by all processes that serve them.

    Args:
        path: The folder.

    Raises:
        NotADirectoryError: if it is not a folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise NotADirectoryError(
                f"Received --adapters {self.path}, which is not a folder; expected one whose "
                "subfolders are adapters or finetune runs. It may be empty."
            )

    def subfolders(self) -> list[str]:
        """The names of all subfolders that are not hidden, sorted."""
        with os.scandir(self.path) as found:
            return sorted(x.name for x in found if x.is_dir() and not x.name.startswith("."))

    def version(self, name: str) -> Version | None:
        """What changes whenever an adapter changes; None if there is none of this name."""
        found = tuple(_stamp(self.path / name / file) for file in _FILES)
        return found if any(found) else None

    def read(self, name: str) -> Entry:
        """Read an adapter.

        Raises:
            ValueError, OSError: if it is damaged or incomplete.
        """
        folder = self.path / name
        if not (folder / RUN_CONFIG).is_file():
            return Entry(Adapter.load(folder), read_labels(folder / LABELS), None)
        run = Run.open(folder)
        return Entry(Adapter.load(run.adapter), tuple(run.labels), run)

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A new hidden folder for the files of an adapter, which is deleted after the block."""
        with temporary_path(self.path / name) as folder:
            folder.mkdir()
            yield folder

    def replace(self, name: str, staged: Path) -> None:
        """Move a staged folder into its place; the caller holds ``locked``.

        Raises:
            NotRemovable: if the folder that it replaces contains more than an adapter.
        """
        self.check_removable(name)
        move_into_place(staged, self.path / name)

    def remove(self, name: str) -> None:
        """Delete an adapter; the caller holds ``locked``.

        Raises:
            NotRemovable: if its folder contains more than an adapter.
        """
        self.check_removable(name)
        # At once for readers, who never see half of it.
        with tempfile.TemporaryDirectory(dir=self.path, prefix=f".{name}-") as hidden:
            os.replace(self.path / name, Path(hidden) / name)

    def check_removable(self, name: str) -> None:
        """Raise for what no request created and nobody could restore, such as a run."""
        folder = self.path / name
        if folder.is_symlink():
            raise NotRemovable("it is a link to another folder")
        if not folder.is_dir():
            return
        others = sorted({x.name for x in folder.iterdir()} - _OWN_FILES)
        if others:
            what = "a finetune run" if RUN_CONFIG in others else f"a folder with {others[0]}"
            raise NotRemovable(f"it is {what}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the folder within this block.

        Where this process may not write, it neither changes the folder nor can lock it.
        """
        if not os.access(self.path, os.W_OK):
            yield
            return
        filelock = require("filelock", extra="serve", why="Serving over HTTP")
        with filelock.FileLock(self.path / _LOCK):
            yield


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_labels(path: Path) -> tuple[str, ...] | None:
    """Read labels, one on a line; None if there is no file.

    Raises:
        ValueError: if they are not UTF-8, empty, or not distinct.
    """
    if not path.is_file():
        return None
    try:
        labels = tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}).") from error
    if not labels or not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(
            f"{path.name} has {len(labels)} labels, some empty or repeated; expected one "
            "distinct label on each line."
        )
    return labels
