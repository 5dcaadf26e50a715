"""Files of a hub repository: huggingface_hub's client, checked content, clear errors.

The client downloads to a temporary name and moves the whole file into its cache, resumes
after a cut within one call, and honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. What
it does not do over plain HTTP is to check the content, which is done here.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple


class Repository(NamedTuple):
    """A repository of models on the hub, at a revision, with the folder of its cache."""

    identifier: str
    revision: str | None
    cache_dir: str | None

    def download(self, filename: str) -> Path:
        """The path of a file of the repository in the cache, after downloading if needed.

        Raises:
            FileNotFoundError: without the repository, the revision or the file, or if it
                is not cached and HF_HUB_OFFLINE is set.
            PermissionError: where the repository asks for a token.
            ConnectionError: if the hub cannot be reached or the connection is lost.
            ValueError: if the content is not what the hub announced. The file is then
                removed from the cache.
        """
        from huggingface_hub import errors, hf_hub_download

        # The first are the classes of whichever HTTP library this version of it uses.
        http: Any = errors.HfHubHTTPError.__bases__
        failures = (*http, OSError, ValueError, errors.EntryNotFoundError)
        try:
            path = hf_hub_download(
                self.identifier,
                filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                library_name="tfimm_lora",
            )
        except failures as error:
            raise self._translated(error, filename) from error
        self._check_content(Path(path))
        return Path(path)

    def download_optional(self, filename: str) -> Path | None:
        """``download``, or None where the repository has no such file."""
        from huggingface_hub import errors

        try:
            return self.download(filename)
        except FileNotFoundError as error:
            cause = error.__cause__
            # Offline nobody can tell a file that is not cached from one that is not there.
            if isinstance(cause, errors.LocalEntryNotFoundError):
                absent = _offline()
            else:
                absent = isinstance(cause, errors.EntryNotFoundError)
            if not absent:
                raise
            return None

    def not_found(self, what: str) -> FileNotFoundError:
        """The error for a repository without the files that are needed."""
        if _offline():
            return FileNotFoundError(
                f"{self} is not in the cache ({what}), and HF_HUB_OFFLINE is set. Download "
                "it once with HF_HUB_OFFLINE=0, or name a local file."
            )
        return FileNotFoundError(
            f"{self} has {what}, and other formats are not read. Look at its files on the hub."
        )

    def __str__(self) -> str:
        revision = f" at revision {self.revision!r}" if self.revision else ""
        return f"The hub repository {self.identifier!r}{revision}"

    def _translated(self, error: Exception, filename: str) -> Exception:
        """An error of the client as a short one of Python's own classes."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{self} asks for access. Accept its terms on the hub, then set HF_TOKEN or "
                "run `hf auth login`."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{self} does not exist, or is private and no valid token is given. Check "
                "the name (such as 'timm/convnext_tiny.fb_in1k') or set HF_TOKEN."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FileNotFoundError(f"{self} has no such revision. Check its name.")
        if _offline() and isinstance(
            error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
        ):
            return self.not_found(f"no {filename}")
        if isinstance(error, errors.LocalEntryNotFoundError):
            return ConnectionError(
                f"{self} could not be reached for {filename}, which is not in the cache "
                f"({_first_line(error.__cause__ or error)}). Check the connection and "
                "HF_ENDPOINT, or name a local file."
            )
        if isinstance(error, errors.EntryNotFoundError):
            return FileNotFoundError(f"{self} has no file {filename}.")
        if isinstance(error, errors.HFValidationError):
            return ValueError(
                f"Received the hub id {self.identifier!r}, which is not one "
                f"({_first_line(error)})."
            )
        return ConnectionError(
            f"{self}: {filename} could not be downloaded whole ({_first_line(error)}). "
            "Nothing was put into the cache. Check the connection and try again."
        )

    def _check_content(self, path: Path) -> None:
        """Compare a cached file with the hash that the hub gave as its name.

        The client keeps a file as ``blobs/<hash>``: SHA-256 for large files, git's SHA-1
        for small ones. Where the cache has no links the hash is not known.
        """
        if not path.is_symlink():
            return
        blob = path.parent / os.readlink(path)
        actual = _digest(path, blob.name)
        if actual is None or actual == blob.name:
            return
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"{self}: {path.name} is not what the hub announced (hash {actual[:12]}..., "
            f"expected {blob.name[:12]}...). It was removed from the cache. Try again; if it "
            "comes back, do not trust that server or proxy."
        )


def _digest(path: Path, announced: str) -> str | None:
    """The hash of a file, of the kind that was announced; None for an unknown kind."""
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        digest = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", announced):
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    else:
        return None
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
