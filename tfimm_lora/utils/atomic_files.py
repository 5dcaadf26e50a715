"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file in one step: after an interruption it is either complete or unchanged.

    Args:
        path: The file. Its folder must exist.
        content: Text is encoded as UTF-8. File names in it that are not UTF-8 keep their
            bytes (Python represents them as surrogates).
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    # One name per process and thread, so that two writers do not share a temporary file.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    unfinished = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


@contextlib.contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside ``path``.

    For libraries that write to a path, and choose the format by its suffix. The folder is
    deleted at the end of the block; call ``move_into_place`` before that to keep the result.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        yield Path(folder) / path.name


def move_into_place(temporary: Path, path: Path) -> None:
    """Move a finished file or folder to ``path``, replacing what is there.

    A file is replaced in one step. A non-empty folder cannot be, so the old one is first moved
    beside the temporary one, and moved back if replacing it fails.
    """
    old = temporary.with_name("replaced")
    if path.is_dir() and not path.is_symlink():
        os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
