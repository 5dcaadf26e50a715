"""Where a file is written until it is known to be right, and how it gets to its place."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name to write to, in a folder beside ``path`` that goes away with the block."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        yield Path(folder) / path.name


def put(draft: Path, path: Path) -> None:
    """Give a finished file or folder its name, in the place of what has it.

    One step for a file. A folder cannot take the place of a full one, so that one is moved
    aside first, to beside the draft, and back if something goes wrong.
    """
    old = draft.with_name("replaced")
    if path.is_dir() and not path.is_symlink():
        os.replace(path, old)
    try:
        os.replace(draft, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
