"""What a command writes: whole or not at all, and nothing of the user's is lost."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from tfimm_lora.cli.app import typer

#: ``--overwrite`` of every command that writes.
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    """Raise if something is at a path and nobody said that it may go.

    An empty folder is nothing.

    Raises:
        FileExistsError: naming the option that allows it.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not empty and not overwrite:
        raise FileExistsError(
            f"{path} is there already; expected a new name. Pass --overwrite to replace it."
        )


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` at the end of the block.

    After an error nothing is left of it, and what was at ``path`` is still there. Folders
    that are missing are made.

    Args:
        path: The file that is wanted.
        overwrite: Whether it may replace another.

    Raises:
        FileExistsError: if something is there and ``overwrite`` is False.
        IsADirectoryError: if that is a folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file.")
    refuse_to_overwrite(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        temporary = Path(folder) / path.name  # with the suffix, by which libraries go
        yield temporary
        temporary.replace(path)
