"""Download adapters from the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

from tfimm_lora.adapters.file_format import CONFIG, WEIGHTS
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.zoo.weights.hub import Repository

#: The start of an address on the hub.
SCHEME = "hf://"


def is_hub_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address on the hub: "hf://user/repo"."""
    return os.fspath(path).startswith(SCHEME)


def download(
    address: str,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Path:
    """Download an adapter from the hub, unless it is in the cache.

    Args:
        address: "hf://user/repo", or "hf://user/repo@revision".
        subfolder: The folder of the adapter within the repository. Default: its root.
        revision: Branch, tag or commit. Default: the revision of the address, or else the
            main branch.
        cache_dir: Folder for downloads. Default: the cache of huggingface_hub (HF_HOME).

    Returns:
        The folder in the cache with the adapter's files.

    Raises:
        ImportError: If huggingface_hub is not installed.
        ValueError: If the address has another form.
        FileNotFoundError, PermissionError, ConnectionError: See ``Repository.download``.
    """
    huggingface_hub()
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not found:
        raise ValueError(
            f"Received path={address!r}; expected 'hf://user/repo' or "
            "'hf://user/repo@revision'."
        )
    repository = Repository(found[1], revision or found[2], cache_dir)
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    repository.download(inside + CONFIG)
    return repository.download(inside + WEIGHTS).parent


def huggingface_hub() -> ModuleType:
    """Import huggingface_hub with its errors.

    Raises:
        ImportError: If it is not installed.
    """
    require("huggingface_hub.errors", extra="weights", why="An adapter on the hub")
    return require("huggingface_hub", extra="weights", why="An adapter on the hub")
