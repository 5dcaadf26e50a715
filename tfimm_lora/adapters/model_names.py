"""Translate adapters between the names of a model and those of any library."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import numpy as np

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.torch_layout import base_kernel
from tfimm_lora.adapters.translation import OfBase, layout_of_timm, translate
from tfimm_lora.families.family import LIBRARIES, V4, V5
from tfimm_lora.families.recognize import Naming, recognize, untranslated
from tfimm_lora.families.templates import Name
from tfimm_lora.model.state import model_state
from tfimm_lora.zoo.weights.keys import to_torch
from tfimm_lora.zoo.weights.module_names import ModuleNames

_D = TypeVar("_D", bound=AdapterData)

#: What users choose from.
NAMES = ("timm", "transformers", "keras_hub", "applications")
DIALECTS = ("v4", "v5")


def in_names_of(names: ModuleNames, adapter: _D, prefix: str | None = None) -> _D:
    """Return an adapter in the names of a model, whichever names it has.

    If the family of the model or of the names is not known, the adapter is returned as it is.

    Args:
        names: The names of the model.
        adapter: The adapter.
        prefix: What comes before the names of the backbone; None to find it.

    Raises:
        ValueError: If some of its names cannot be translated; or with a prefix, if they do not
            begin with it.
    """
    if prefix is None and all(module in names.paths for module in adapter.layers):
        return adapter
    target = names.naming
    if target is None:
        return adapter
    source = recognize(
        [*adapter.layers],
        family=target.family,
        hint=adapter.base_model,
        depths=target.depths,
    )
    if prefix is not None:
        source = _with_prefix(target, adapter, prefix)
    if source is None or source == target:
        return adapter
    return translate(
        adapter, source, target, base_norms(names, target), base_weights(names, target)
    )


def in_library(
    names: ModuleNames, adapter: _D, library: str, dialect: str, prefix: str | None
) -> _D:
    """Return the adapter of a model in the names of a library.

    Args:
        names: The names of the model.
        adapter: Its adapter, in its names.
        library: One of ``NAMES``.
        dialect: For transformers, one of ``DIALECTS``.
        prefix: What comes before the names of the backbone; None for that of the library.

    Raises:
        ValueError: If the library or the dialect is unknown, the family of the model is not
            known or not in that library, or a layer has no name there.
    """
    source = names.naming
    if source is None:
        check_library(library, dialect)
        raise ValueError(
            f"Received names={library!r} for model '{names.model.name}' "
            f"({type(names.model).__name__}), which is of no family whose names are known. "
            "Leave names out to save the paths of its layers."
        )
    target = target_naming(source, library, dialect, prefix)
    return translate(
        adapter, source, target, base_norms(names, source), base_weights(names, source)
    )


def target_naming(source: Naming, library: str, dialect: str, prefix: str | None) -> Naming:
    """Return the naming of a family in a library that users named; see ``in_library``."""
    check_library(library, dialect)
    family = source.family
    internal = {"v4": V4, "v5": V5}[dialect] if library == "transformers" else library
    if internal not in family.libraries():
        known = dict.fromkeys(x.partition("-")[0] for x in family.libraries())
        raise ValueError(
            f"Received names={library!r} for {family.name}, which has no names there; "
            f"expected one of {', '.join(known)}."
        )
    if prefix is None:
        backbone = next(iter(family.transformers.values()), "")
        prefix = f"{backbone}." if library == "transformers" and backbone else ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
    return Naming(family, internal, prefix, depths=source.depths)


def check_library(library: str, dialect: str) -> None:
    """Raise a ValueError unless these are the names of a library and a dialect."""
    if library not in NAMES:
        raise ValueError(f"Received names={library!r}; expected one of {', '.join(NAMES)}.")
    if dialect not in DIALECTS:
        raise ValueError(
            f"Received dialect={dialect!r}; expected one of {', '.join(DIALECTS)}, the major "
            "versions of transformers."
        )


def base_norms(names: ModuleNames, naming: Naming) -> OfBase:
    """Return the function that computes the norms of the base weights of a model's modules."""

    def norms(name: Name) -> np.ndarray | None:
        """Return the norms of the rows of a module, or of one of its blocks."""
        own = naming.from_timm(name)
        if own in names.paths:
            return _norms(base_kernel(names.layers[names.paths[own]]))
        whole = naming.from_timm(Name(name.name))
        layout = layout_of_timm(name.name)
        if name.block is None or whole not in names.paths:
            return None
        rows = _norms(base_kernel(names.layers[names.paths[whole]]))
        return np.split(rows, len(layout))[layout.index(name.block)]

    return norms


def base_weights(names: ModuleNames, naming: Naming) -> OfBase:
    """Return the function that returns the base weights of a model."""
    by_key = {weight.key: weight for weight in names.weights}
    replaced = model_state(names.model).replaced

    def value(key: str) -> np.ndarray:
        weight = by_key[key]
        if key in replaced:
            return to_torch(replaced[key].before, weight.target)
        return weight.value()

    def weights(name: Name) -> np.ndarray | None:
        """Return a weight, or one of its blocks."""
        own = naming.from_timm(name, True)
        if own in by_key:
            return value(own)
        whole = naming.from_timm(Name(name.name), True)
        layout = layout_of_timm(name.name.rpartition(".")[0])
        if name.block is None or whole not in by_key:
            return None
        return np.split(value(whole), len(layout))[layout.index(name.block)]

    return weights


def _norms(kernel: np.ndarray) -> np.ndarray:
    norms: np.ndarray = np.linalg.norm(kernel.reshape(len(kernel), -1), axis=1)
    return norms


def _with_prefix(target: Naming, adapter: AdapterData, prefix: str) -> Naming:
    """Return the naming of an adapter behind a prefix that the user gave."""
    before = f"{prefix.rstrip('.')}." if prefix else ""
    candidates = [
        dataclasses.replace(target, library=library, prefix=before, head=None)
        for library in LIBRARIES
        if library in target.family.libraries()
    ]
    best = min(candidates, key=lambda x: len(untranslated(x, adapter.layers)))
    unknown = untranslated(best, adapter.layers)
    if unknown:
        raise ValueError(
            f"Received prefix={prefix!r} for an adapter of {target.family.name}, which is not "
            f"before the names that are known: {', '.join(unknown[:10])}. Leave it out to find "
            "the prefix."
        )
    return best
