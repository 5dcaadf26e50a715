"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card.

The format is PEFT's. What PEFT has no field for is in the metadata of the safetensors header,
which PEFT ignores: the blocks of fused projections, the kinds of layers that PEFT does not
have, the shapes of convolutions with LoHa, and the hash of the config that belongs to the
weights.
"""

from __future__ import annotations

from types import ModuleType

from tfimm_lora.utils.optional_imports import require

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"

#: A config that was written, but not yet renamed to ``CONFIG``; see ``write_files``.
PENDING_CONFIG = CONFIG + ".new"

#: The start of every tensor name in PEFT's files.
PREFIX = "base_model.model."

#: The key of the metadata of this package, a JSON object, and its version.
METADATA_KEY = "tfimm_lora"
METADATA_VERSION = 1


def safetensors() -> ModuleType:
    """Import safetensors with its NumPy functions.

    Raises:
        ImportError: If it is not installed.
    """
    require("safetensors.numpy", extra="weights", why="An adapter file")
    return require("safetensors", extra="weights", why="An adapter file")
