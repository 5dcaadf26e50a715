"""Translate adapters between the names of a model and those of any library."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TypeVar

import numpy as np

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.torch_layout import base_kernel
from tfimm_lora.adapters.translation import translate
from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import APPLICATIONS, V4, V5
from tfimm_lora.families.recognize import (
    Naming,
    explanation,
    recognize,
    recognize_other,
    recognize_surely,
    untranslated,
)
from tfimm_lora.families.templates import Name
from tfimm_lora.model.state import model_state
from tfimm_lora.zoo.weights.keys import to_torch
from tfimm_lora.zoo.weights.module_names import ModuleNames
from tfimm_lora.zoo.weights.renamed import OfBase, layout_of_timm

_D = TypeVar("_D", bound=AdapterData)

#: What users choose from.
NAMES = ("timm", "transformers", "keras_hub", "applications")
DIALECTS = ("v4", "v5")


def in_names_of(names: ModuleNames, adapter: _D, prefix: str | None = None) -> _D:
    """Return an adapter in the names of a model, whichever names it has.

    If the family of the model or of the names is not known, or they are of another family, the
    adapter is returned as it is.

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
        same = [dataclasses.replace(target, library=x) for x in target.family.libraries]
        source = _with_prefix(same, adapter, prefix, "prefix")
    if source is None or source == target:
        return adapter
    if prefix is None and untranslated(source, adapter.layers):
        other = recognize_other([*adapter.layers], target, hint=adapter.base_model)
        if other is not None and other.family is not target.family:
            return adapter
    return translate(
        adapter, source, target, base_norms(names, target), base_weights(names, target)
    )


def in_library(
    names: ModuleNames, adapter: _D, library: str, dialect: str | None, prefix: str | None
) -> _D:
    """Return the adapter of a model in the names of a library.

    Args:
        names: The names of the model.
        adapter: Its adapter, in its names.
        library: One of ``NAMES``.
        dialect: For transformers, one of ``DIALECTS``; None for the later one.
        prefix: What comes before the names of the backbone; None for that of the library.

    Raises:
        ValueError: If the library or the dialect is unknown, the family of the model is not
            known or not in that library, or a layer has no name there.
    """
    source = names.naming
    check_library(library, dialect, prefix)
    if names.is_tfimm and library == "timm" and not prefix:
        return adapter  # tfimm has timm's names, also those of families without a table
    if source is None:
        raise ValueError(
            f"Received names={library!r} for model '{names.model.name}' "
            f"({type(names.model).__name__}), which is of no family whose names are known. "
            "Leave names out to save the paths of its layers."
        )
    target = target_naming(source, library, dialect, prefix)
    return translate(
        adapter, source, target, base_norms(names, source), base_weights(names, source)
    )


def target_naming(
    source: Naming, library: str, dialect: str | None, prefix: str | None
) -> Naming:
    """Return the naming of a family in a library that users named; see ``in_library``."""
    check_library(library, dialect, prefix)
    family = source.family
    internal = (V4 if dialect == "v4" else V5) if library == "transformers" else library
    if internal not in family.libraries:
        known = dict.fromkeys(x.partition("-")[0] for x in family.libraries)
        raise ValueError(
            f"Received names={library!r} for {family.name}, which has no names there; "
            f"expected one of {', '.join(known)}."
        )
    if prefix is None:
        backbone = next(iter(family.transformers.values()), "")
        prefix = f"{backbone}." if library == "transformers" and backbone else ""
    else:
        prefix = _complete(prefix, internal)
    return Naming(family, internal, prefix, depths=source.depths)


def _complete(prefix: str, library: str) -> str:
    """Return a prefix with its dot. Those of keras.applications have none: "convnext_tiny_"."""
    return f"{prefix.rstrip('.')}." if prefix and library != APPLICATIONS else prefix


def check_library(library: str | None, dialect: str | None, prefix: str | None = None) -> None:
    """Raise an error unless these are a library, a dialect and a prefix that go together.

    Args:
        library: One of ``NAMES``; None if the names of a model are not changed.
        dialect: For transformers one of ``DIALECTS``, or None for the default; else None.
        prefix: What comes before the names of the backbone, or None.

    Raises:
        TypeError: If the prefix is not a string.
        ValueError: If an argument is unknown, or has no effect.
    """
    check_prefix(prefix, "prefix")
    if library is None and (dialect is not None or prefix is not None):
        raise ValueError(
            f"Received dialect={dialect!r} and prefix={prefix!r} without names, where they "
            f"have no effect; expected names, one of {', '.join(NAMES)}."
        )
    if library is not None and library not in NAMES:
        raise ValueError(f"Received names={library!r}; expected one of {', '.join(NAMES)}.")
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(
            f"Received dialect={dialect!r}; expected one of {', '.join(DIALECTS)}, the major "
            "versions of transformers."
        )
    if dialect is not None and library != "transformers":
        raise ValueError(
            f"Received dialect={dialect!r} with names={library!r}, where it has no effect; "
            "expected it only with names='transformers'."
        )


def check_prefix(prefix: str | None, name: str) -> None:
    """Raise a TypeError unless a prefix is a string or None."""
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(
            f"Received {name}={prefix!r}; expected a string, for example 'encoder.'."
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


def naming_of_adapter(adapter: AdapterData, prefix: str | None = None) -> Naming:
    """Return the naming of an adapter, whose model is not known.

    Args:
        adapter: The adapter.
        prefix: What comes before the names of the backbone; None to find it.

    Raises:
        ValueError: If no family has its names; or with a prefix, if no family has all of them
            behind it.
    """
    if prefix is not None:
        candidates = [Naming(x, y) for x in reversed(FAMILIES) for y in x.libraries]
        return _with_prefix(candidates, adapter, prefix, "source_prefix")
    found = recognize_surely([*adapter.layers], hint=adapter.base_model)
    if found is None:
        known = ", ".join(family.name for family in FAMILIES)
        whose = explanation([*adapter.layers], None)
        whose = whose or "docs/reference/names.md lists the names of each."
        raise ValueError(
            f"Received an adapter of no known family, with the layers "
            f"{', '.join([*adapter.layers][:3])}{', ...' if len(adapter.layers) > 3 else ''}; "
            f"expected names of {known}. {whose} "
            "If they are behind the prefix of a model of your own, pass it as source_prefix."
        )
    return found


def weights_by_timm_key(adapter: AdapterData) -> dict[str, np.ndarray]:
    """Return the fully trained weights of an adapter by timm's keys, where known."""
    naming = recognize_surely([*adapter.layers], hint=adapter.base_model)
    if naming is None:
        return dict(adapter.weights)
    found = {key: naming.to_timm(key, is_weight=True) for key in adapter.weights}
    return {str(found[key] or key): value for key, value in adapter.weights.items()}


def _with_prefix(
    candidates: Collection[Naming], adapter: AdapterData, prefix: str, argument: str
) -> Naming:
    """Return that of some namings which an adapter has behind a prefix that the user gave."""
    behind = [
        dataclasses.replace(x, prefix=_complete(prefix, x.library), head=None)
        for x in candidates
    ]
    best = min(behind, key=lambda x: len(untranslated(x, adapter.layers)))
    unknown = untranslated(best, adapter.layers)
    if unknown:
        raise ValueError(
            f"Received {argument}={prefix!r} for an adapter, which is not before the "
            f"names that are known: {', '.join(unknown[:10])}. Leave it out to find the prefix."
        )
    return best
