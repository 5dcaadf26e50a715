"""Write an adapter to a folder, so that a killed process leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.adapters import loha_tensors
from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.card import MARK, model_card
from tfimm_lora.adapters.file_format import (
    CARD,
    CONFIG,
    METADATA_KEY,
    METADATA_VERSION,
    PENDING_CONFIG,
    PREFIX,
    WEIGHTS,
    safetensors,
)
from tfimm_lora.adapters.layer_update import OWN_KINDS, LayerUpdate
from tfimm_lora.adapters.peft_config import config_fields
from tfimm_lora.adapters.tensor_names import ambiguous, in_file
from tfimm_lora.utils.atomic_files import write_file


def write(
    adapter: AdapterData, path: str | os.PathLike[str], format: str | None = None
) -> None:
    """Write an adapter to a folder; see ``Adapter.save``."""
    if format not in (None, "peft"):
        raise ValueError(f"Received format={format!r}; expected None or 'peft'.")
    refused = adapter.not_in_peft()
    if refused and format == "peft":
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"Received format='peft' for an adapter that PEFT cannot express: {listed}. Leave "
            "format out to write the extension that this package reads, or train without these "
            "layers in lora_targets, or without these biases."
        )
    fields = config_fields(adapter, own=bool(refused))
    # Not sorted: the first pattern that matches counts.
    config = (json.dumps(fields, indent=2) + "\n").encode()
    weights = _serialized(adapter, hashlib.sha256(config).hexdigest())
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"Received path={str(path)!r}, a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # The weights contain the hash of their config. If the process is killed between the two
    # renames, the reader finds the config under its other name; see `read_files`.
    write_file(folder / PENDING_CONFIG, config)
    write_file(folder / WEIGHTS, weights)
    os.replace(folder / PENDING_CONFIG, folder / CONFIG)
    _sync(folder)
    if _may_replace(folder / CARD):
        write_file(folder / CARD, model_card(adapter, fields))


def _may_replace(card: Path) -> bool:
    """Whether there is no model card, or one that this package wrote."""
    return not card.exists() or MARK in card.read_text(errors="replace")


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _serialized(adapter: AdapterData, config_hash: str) -> bytes:
    """Return the content of the safetensors file."""
    tensors: dict[str, np.ndarray] = {}
    for module, update in adapter.layers.items():
        for name, value in _tensors_of(update).items():
            tensors[f"{PREFIX}{module}.{name}"] = np.ascontiguousarray(value)
    for key, value in adapter.weights.items():
        tensors[f"{PREFIX}{in_file(key, adapter.layers)}"] = np.ascontiguousarray(value)
    metadata = {"format": "pt", METADATA_KEY: _own_metadata(adapter, config_hash)}
    return _with_ordered_metadata(safetensors().numpy.save(tensors, metadata))


def _tensors_of(update: LayerUpdate) -> dict[str, np.ndarray]:
    """Return the arrays of an update by PEFT's names."""
    if update.is_loha:
        return loha_tensors.tensors_of(update)
    if update.kind == "embedding":
        tensors = {"lora_embedding_A": update.a, "lora_embedding_B": update.b}
    else:
        tensors = {"lora_A.weight": update.a, "lora_B.weight": update.b}
    if update.magnitude is not None:
        # PEFT's convolutions store it in a shape that broadcasts with their outputs.
        axes = update.a.ndim - 2
        shape = (1, -1, *(1 for _ in range(axes))) if axes else (-1,)
        tensors["lora_magnitude_vector"] = update.magnitude.reshape(shape)
    if update.bias is not None:
        tensors["lora_B.bias"] = update.bias
    return tensors


def _own_metadata(adapter: AdapterData, config_hash: str) -> str:
    metadata: dict[str, Any] = {"version": METADATA_VERSION, "config": config_hash}
    layers = adapter.layers.items()
    optional: dict[str, Any] = {
        "kinds": {m: x.kind for m, x in layers if x.kind in OWN_KINDS},
        "qkv": {m: list(x.qkv) for m, x in layers if x.qkv},
        "windows": {m: list(x.a.shape[1:]) for m, x in layers if x.is_loha and x.a.ndim > 2},
        # alpha / rank may differ from the scale by rounding.
        "scales": {m: x.scale for m, x in layers if x.alpha / x.rank != x.scale},
        "task": None if adapter.task is None else adapter.task.to_dict(),
        "whole": ambiguous(in_file(key, adapter.layers) for key in adapter.weights),
    }
    metadata.update({name: value for name, value in optional.items() if value})
    return json.dumps(metadata, separators=(",", ":"))


def _with_ordered_metadata(content: bytes) -> bytes:
    """Sort the metadata of the file, which safetensors writes in a random order.

    Equal adapters are then equal files, which can be compared by their hash.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]
