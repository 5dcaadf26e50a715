"""``push_to_hub``: upload an adapter to the hub."""

from __future__ import annotations

import re
import tempfile
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.file_format import CARD, CONFIG, WEIGHTS
from tfimm_lora.adapters.hub_download import SCHEME, huggingface_hub
from tfimm_lora.adapters.save import adapter_of


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
        adapter: An ``Adapter``, or a LoRA model.
        repo_id: "user/repo". The repository is created if it does not exist.
        private: Whether a new repository is private. Default: the setting of the account.
        revision: The branch. Default: the main branch.
        commit_message: The message of the commit.
        format: As in ``Adapter.save``.

    Returns:
        The address of the repository for ``Adapter.load``, "hf://user/repo".

    Raises:
        ImportError: If huggingface_hub is not installed.
        PermissionError: If the hub refuses the token (HF_TOKEN or `hf auth login`).
        ConnectionError: If the hub cannot be reached or refuses the upload.
        ValueError: As ``Adapter.save``, or if repo_id has another form.
    """
    hub: Any = huggingface_hub()
    if not isinstance(adapter, Adapter):
        adapter = adapter_of(adapter)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"Received repo_id={repo_id!r}; expected 'user/repo'.")
    client = hub.HfApi(library_name="tfimm_lora")
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder, format)
        # The base classes are those of the HTTP library that huggingface_hub uses.
        http_errors: Any = hub.errors.HfHubHTTPError.__bases__
        try:
            client.create_repo(repo_id, private=private, exist_ok=True)
            client.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
            )
        except (*http_errors, OSError, hub.errors.HfHubHTTPError) as error:
            raise _translated(error, repo_id) from error
    return f"{SCHEME}{repo_id}"


def _translated(error: Exception, repo_id: str) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(
            f"The hub does not allow this token to write to {repo_id!r}. Set HF_TOKEN to a "
            "token with write access, or run `hf auth login`."
        )
    return ConnectionError(
        f"The adapter could not be uploaded to {repo_id!r}: {error}. Check the connection, "
        "HF_ENDPOINT and whether HF_HUB_OFFLINE is set."
    )
