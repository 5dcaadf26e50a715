"""``ServingSettings``: what is served, and the limits of requests."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tfimm_lora.config import Targets
from tfimm_lora.validation import check_integer, check_number

#: The environment variable with the token.
TOKEN_VARIABLE = "TFIMM_LORA_TOKEN"

#: A shorter token could be guessed.
_LEAST_TOKEN = 16

#: The requests that may wait or run at a time, in batches.
_WAITING_BATCHES = 8


@dataclass(frozen=True)
class ServingSettings:
    """All settings of ``tfimm-lora serve``.

    Args:
        base: The base model: the folder of a finetune run, or what ``open_base_model`` takes.
        adapters: The folder whose subfolders are adapters or finetune runs.
        weights, input_size, normalisation: As for ``open_base_model``; not for a run, which
            has its own.
        capacity: The number of adapters on the device. The others are in the memory of the
            host. Default: 64.
        max_rank: The largest rank of an adapter. Default: that of adapters in the folder, or
            16 if it is empty.
        max_classes: The largest number of classes of an adapter. Default: that of the adapters
            in the folder and of the base model.
        targets: The layers that uploaded adapters may have factors for, as in ``lora_targets``.
            Default: those of the adapters in the folder, or the default targets of the model if
            it is empty.
        max_batch: The most pictures in a batch. Default: 32.
        max_wait_ms: How long the first picture of a batch waits for others. Default: 5 ms.
        max_upload_mb: The largest request with a picture, in MB. Default: 10.
        max_adapter_mb: The largest upload of an adapter, in MB. Default: 256.
        max_pixels: The most pixels of a picture. Default: 25 million.
        timeout: The seconds after which a request ends with an error. Default: 30.
        token: The token for adding and removing adapters. Default: none, so that nobody can.

    Raises:
        TypeError, ValueError: for a value of the wrong type or out of range.
    """

    base: str
    adapters: str
    weights: str | None = None
    input_size: tuple[int, int] | None = None
    normalisation: str | None = None
    capacity: int = 64
    max_rank: int | None = None
    max_classes: int | None = None
    targets: Targets = None
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_upload_mb: float = 10.0
    max_adapter_mb: float = 256.0
    max_pixels: int = 25_000_000
    timeout: float = 30.0
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("capacity", "max_batch", "max_pixels"):
            check_integer(getattr(self, name), name, 1)
        for name in ("max_rank", "max_classes"):
            if getattr(self, name) is not None:
                check_integer(getattr(self, name), name, 1)
        check_number(self.max_wait_ms, "max_wait_ms", least=0)
        for name in ("max_upload_mb", "max_adapter_mb", "timeout"):
            check_number(getattr(self, name), name, 0, exclusive=True)

    @property
    def max_waiting(self) -> int:
        """The most requests for predictions that are in progress at a time."""
        return _WAITING_BATCHES * self.max_batch

    @property
    def upload_bytes(self) -> int:
        """``max_upload_mb`` in bytes."""
        return int(self.max_upload_mb * 1e6)

    @property
    def adapter_bytes(self) -> int:
        """``max_adapter_mb`` in bytes."""
        return int(self.max_adapter_mb * 1e6)

    @property
    def adapter_timeout(self) -> float:
        """The seconds for the upload of an adapter: as many for each byte as for a picture."""
        return self.timeout * max(1.0, self.adapter_bytes / self.upload_bytes)


def read_token(file: Path | None) -> str | None:
    """Read the token from a file, or from the environment variable; None if there is none.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if both are given, or the token is not usable.
    """
    variable = os.environ.get(TOKEN_VARIABLE)
    if file is None and variable is None:
        return None
    if file is not None and variable is not None:
        raise ValueError(
            f"Received --token-file {file} and the environment variable {TOKEN_VARIABLE}; "
            "expected one of them."
        )
    source = f"the variable {TOKEN_VARIABLE}" if file is None else f"the token file {file}"
    text = variable if file is None else file.read_text(encoding="utf-8", errors="replace")
    token = (text or "").strip()
    usable = token.isascii() and token.isprintable() and " " not in token
    if not usable or len(token) < _LEAST_TOKEN:
        raise ValueError(
            f"Received {source} with {len(token)} characters; expected a token of at least "
            f"{_LEAST_TOKEN} printable ASCII characters without spaces. Make one with: "
            'python -c "import secrets; print(secrets.token_urlsafe(32))"'
        )
    return token
