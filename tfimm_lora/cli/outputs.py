"""Where commands write: complete files only, and nothing is overwritten unasked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tfimm_lora.utils.atomic_files import move_into_place, temporary_path

#: ``--overwrite`` of every command that writes.
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def refuse_to_overwrite(path: Path, overwrite: bool) -> None:
    """Raise if ``path`` exists and ``overwrite`` is False. Empty folders do not count.

    Raises:
        FileExistsError: naming the option that allows it.
    """
    empty = path.is_dir() and not any(path.iterdir())
    if (path.exists() or path.is_symlink()) and not empty and not overwrite:
        raise FileExistsError(
            f"{path} already exists; expected a new name. Pass --overwrite to replace it."
        )


@contextlib.contextmanager
def new_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write to, which is renamed to ``path`` at the end of the block.

    After an error, ``path`` is unchanged. Missing parent folders are created.

    Args:
        path: The file to write.
        overwrite: Whether it may replace an existing file.

    Raises:
        FileExistsError: if the file exists and ``overwrite`` is False.
        IsADirectoryError: if ``path`` is a folder.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file.")
    refuse_to_overwrite(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(path) as temporary:
        yield temporary
        move_into_place(temporary, path)
