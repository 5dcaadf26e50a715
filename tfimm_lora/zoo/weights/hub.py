"""Download files of a hub repository, check their content, and translate errors.

huggingface_hub downloads to a temporary name, moves the complete file into its cache, resumes
an interrupted download within one call, and respects HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
HF_TOKEN. It does not check the content of files that it gets over plain HTTP, so that is done
here.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds to wait for a connection to the hub.
_CONNECTION_TIMEOUT = 10.0


class Repository(NamedTuple):
    """A model repository on the hub.

    Attributes:
        identifier: "user/repo".
        revision: Branch, tag or commit; None for the main branch.
        cache_dir: Folder for downloads; None for the cache of huggingface_hub.
    """

    identifier: str
    revision: str | None
    cache_dir: str | None

    def download(self, filename: str) -> Path:
        """Download a file of the repository, unless it is in the cache.

        Returns:
            Its path in the cache.

        Raises:
            FileNotFoundError: If the repository, the revision or the file does not exist, or
                if the file is not cached and HF_HUB_OFFLINE is set.
            PermissionError: If the repository needs a token.
            ConnectionError: If the hub cannot be reached or the connection is lost.
            ValueError: If the content does not have the hash that the hub announced. The file
                is then removed from the cache.
        """
        from huggingface_hub import errors, hf_hub_download

        # The base classes are those of the HTTP library that huggingface_hub uses.
        http_errors: Any = errors.HfHubHTTPError.__bases__
        failures = (*http_errors, OSError, ValueError, errors.EntryNotFoundError)
        unreachable = _unreachable()
        try:
            path = hf_hub_download(
                self.identifier,
                filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                library_name="tfimm_lora",
                local_files_only=unreachable is not None,
            )
        except failures as error:
            if unreachable is not None and isinstance(error, errors.LocalEntryNotFoundError):
                raise self._not_reached(filename, unreachable) from error
            raise self._translated(error, filename) from error
        self._check_content(Path(path))
        return Path(path)

    def download_optional(self, filename: str) -> Path | None:
        """Download a file as ``download`` does; return None if the repository lacks it."""
        from huggingface_hub import errors

        try:
            return self.download(filename)
        except FileNotFoundError as error:
            cause = error.__cause__
            # Offline, a file that is not cached looks like a file that does not exist.
            if isinstance(cause, errors.LocalEntryNotFoundError):
                absent = _offline()
            else:
                absent = isinstance(cause, errors.EntryNotFoundError)
            if not absent:
                raise
            return None

    def not_found(self, missing: str) -> FileNotFoundError:
        """Return the error for a repository without the files that are needed.

        Args:
            missing: What is missing, as the object of "has": "no model.safetensors".
        """
        if _offline():
            return FileNotFoundError(
                f"{self} is not in the cache ({missing}), and HF_HUB_OFFLINE is set. Download "
                "it once with HF_HUB_OFFLINE=0, or pass a local file."
            )
        return FileNotFoundError(
            f"{self} has {missing}, and other formats are not supported. See its files on the "
            "hub."
        )

    def __str__(self) -> str:
        revision = f" at revision {self.revision!r}" if self.revision else ""
        return f"The hub repository {self.identifier!r}{revision}"

    def _translated(self, error: Exception, filename: str) -> Exception:
        """Translate an error of huggingface_hub to a short one of a built-in class."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{self} requires access. Accept its terms on the hub, then set HF_TOKEN or "
                "run `hf auth login`."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{self} does not exist, or it is private and there is no valid token. Check "
                "the name (such as 'timm/convnext_tiny.fb_in1k') or set HF_TOKEN."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FileNotFoundError(f"{self} has no such revision. Check its name.")
        if _offline() and isinstance(
            error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
        ):
            return self.not_found(f"no {filename}")
        if isinstance(error, errors.LocalEntryNotFoundError):
            return self._not_reached(filename, error.__cause__ or error)
        if isinstance(error, errors.EntryNotFoundError):
            return FileNotFoundError(f"{self} has no file {filename}.")
        if isinstance(error, errors.HFValidationError):
            return ValueError(
                f"Received the hub id {self.identifier!r}, which is not valid "
                f"({_first_line(error)}); expected 'user/repo'."
            )
        return ConnectionError(
            f"{self}: {filename} could not be downloaded completely ({_first_line(error)}). "
            "The cache is unchanged. Check the connection and try again."
        )

    def _not_reached(self, filename: str, reason: BaseException) -> ConnectionError:
        return ConnectionError(
            f"{self} could not be reached for {filename}, which is not in the cache "
            f"({_first_line(reason)}). Check the connection and HF_ENDPOINT, or pass a local "
            "file."
        )

    def _check_content(self, path: Path) -> None:
        """Compare the hash of a cached file with the one that the hub announced.

        huggingface_hub stores a file as ``blobs/<hash>``: SHA-256 for large files, git's SHA-1
        for small ones. On file systems without links, the hash is not known.
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
            f"{self}: {path.name} is not the file that the hub announced (hash "
            f"{actual[:12]}..., expected {blob.name[:12]}...). It was removed from the cache. "
            "Try again; if the error persists, do not trust this server or proxy."
        )


def _digest(path: Path, announced: str) -> str | None:
    """Return the hash of a file, of the announced kind; None if the kind is unknown."""
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

    return bool(constants.HF_HUB_OFFLINE)


def _unreachable() -> OSError | None:
    """The reason why no connection to the hub can be opened, or None.

    huggingface_hub repeats each request five times, with pauses, which takes half a minute
    without a network.
    """
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if _offline() or address.hostname is None or urllib.request.getproxies():
        return None
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=_CONNECTION_TIMEOUT).close()
    except OSError as error:
        return error
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
