"""Adapters from the hub and to it, through huggingface_hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.files import CARD, CONFIG, WEIGHTS
from tfimm_lora.adapters.save import adapter_of
from tfimm_lora.zoo.weights.hub import Repository

_SCHEME = "hf://"


def is_hub_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one on the hub: "hf://user/repo"."""
    return os.fspath(path).startswith(_SCHEME)


def download(address: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder in the cache with an adapter of the hub, after downloading if needed.

    Args:
        address: "hf://user/repo", or "hf://user/repo@revision".
        revision: Branch, tag or commit. Default: that of the address, else the main branch.
        cache_dir: Folder for downloads. Default: that of huggingface_hub (HF_HOME).

    Raises:
        ImportError: if huggingface_hub is not installed.
        ValueError: for an address of another form.
        FileNotFoundError, PermissionError, ConnectionError: see ``Repository.download``.
    """
    _huggingface_hub()
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not found:
        raise ValueError(
            f"Received path={address!r}; expected 'hf://user/repo' or "
            "'hf://user/repo@revision'."
        )
    repository = Repository(found[1], revision or found[2], cache_dir)
    repository.download(CONFIG)
    return repository.download(WEIGHTS).parent


def push_to_hub(
    adapter: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    format: str | None = None,
) -> str:
    """Upload an adapter to the hub, with its model card, in one commit.

    Args:
        adapter: An ``Adapter``, or a LoRA model that holds one.
        repo_id: "user/repo". It is created if it does not exist.
        private: Whether a new repository is private. Default: as the account is set.
        revision: The branch. Default: the main branch.
        commit_message: What the commit says.
        format: As in ``Adapter.save``.

    Returns:
        The address of the repository, "hf://user/repo", for ``Adapter.load``.

    Raises:
        ImportError: if huggingface_hub is not installed.
        PermissionError: if the hub refuses the token (HF_TOKEN or `hf auth login`).
        ConnectionError: if the hub cannot be reached or refuses the upload.
        ValueError: as ``Adapter.save``, or for a wrong repo_id.
    """
    hub = _huggingface_hub()
    if not isinstance(adapter, Adapter):
        adapter = adapter_of(adapter)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"Received repo_id={repo_id!r}; expected 'user/repo'.")
    client = hub.HfApi(library_name="tfimm_lora")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder, format)
        http: Any = hub.errors.HfHubHTTPError.__bases__
        try:
            client.create_repo(repo_id, private=private, exist_ok=True)
            client.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
            )
        except (*http, OSError, hub.errors.HfHubHTTPError) as error:
            raise _translated(error, repo_id) from error
    return f"{_SCHEME}{repo_id}"


def _translated(error: Exception, repo_id: str) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"The hub does not let this token write to {repo_id!r}. Set HF_TOKEN to one that "
            "may write, or run `hf auth login`."
        )
    return ConnectionError(
        f"The adapter could not be uploaded to {repo_id!r}: {error}. Check the connection, "
        "HF_ENDPOINT and whether HF_HUB_OFFLINE is set."
    )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "Adapters of the hub need huggingface_hub, which is not installed: pip install "
            "huggingface_hub"
        ) from error
    return huggingface_hub
