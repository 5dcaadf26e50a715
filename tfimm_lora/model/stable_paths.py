"""Paths of layers that do not depend on what else was created in the process.

Keras numbers the layers of a class that have no name of their own: the first dense layer of a
process is "dense", the next "dense_1".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def stable_paths(layers: Mapping[str, Any]) -> dict[str, str]:
    """Replace the numbers in names that Keras gave by the order of the layers.

    Args:
        layers: Path -> layer, parents first, without the model itself.

    Returns:
        Path -> stable path.
    """
    stable: dict[str, str] = {"": ""}
    counts: dict[tuple[str, str], int] = {}
    for path, layer in layers.items():  # parents first
        parent = path.rpartition("/")[0]
        while parent not in stable:
            parent = parent.rpartition("/")[0]
        name = path[len(parent) :].strip("/")
        if re.fullmatch(rf"{_keras_name(layer)}(_\d+)?", name):
            stem = re.sub(r"_\d+$", "", name)
            index = counts.get((parent, stem), 0)
            counts[parent, stem] = index + 1
            name = f"{stem}_{index}" if index else stem
        stable[path] = f"{stable[parent]}/{name}".strip("/")
    return stable


def _keras_name(layer: Any) -> str:
    """Return a pattern for the name that Keras gives to a layer: "multi_head_attention"."""
    plain = next(c for c in type(layer).__mro__ if not c.__module__.startswith("tfimm_lora"))
    # Legacy Keras, and Keras 3, which does not count digits to a word.
    names = {_snake_case(plain.__name__, word) for word in ("[A-Z][a-z0-9]+", "[A-Z][a-z]+")}
    # Legacy Keras names functional models "model".
    names |= {"model"} if "functional" in names else set()
    return f"({'|'.join(sorted(names))})"


def _snake_case(name: str, word: str) -> str:
    words = re.sub(f"(.)({word})", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
