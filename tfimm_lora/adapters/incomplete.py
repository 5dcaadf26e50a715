"""Layers and weights that the config of an adapter selects in a model, but its file lacks.

The file may be damaged, or of a smaller model of the same family, whose layers a larger model
has too.
"""

from __future__ import annotations

import warnings

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.peft.matching import PeftSelection, with_parents
from tfimm_lora.zoo.weights.module_names import ModuleNames

#: The number of layers that a warning lists.
_MAX_LISTED = 10


def warn_if_incomplete(names: ModuleNames, adapter: AdapterData, stacklevel: int) -> None:
    """Warn of modules that the config selects and the file lacks, and of the reverse.

    PEFT warns of the former too, and ignores the latter.
    """
    selected = _selection_of(adapter)
    if selected is None:
        return
    adapted = {names.paths.get(module) for module in adapter.layers}
    trained = _trained_modules(names, adapter, selected)
    missing = [module for module, (found, _) in trained.items() if not found]
    extra = []
    if selected.targets is not None and not selected.is_all_linear:
        missing += [
            module
            for path, module in names.modules.items()
            if path not in adapted and names.is_adaptable(path) and selected.adapts(module)
        ]
        extra = [module for module in adapter.layers if not selected.adapts(module)]
    if missing:
        warnings.warn(
            f"The adapter has no values for {len(missing)} layers that its config selects in "
            f"model '{names.model.name}': {_listed(missing)}. They stay as they are in the "
            "base model. The file is incomplete, or the adapter is of a smaller model.",
            stacklevel=stacklevel + 1,
        )
    if extra:
        warnings.warn(
            f"The adapter has values for {len(extra)} layers that its config does not select: "
            f"{_listed(extra)}. They are loaded; PEFT would ignore them.",
            stacklevel=stacklevel + 1,
        )


def missing_weights(names: ModuleNames, adapter: AdapterData) -> list[str]:
    """Return the weights that the file lacks of fully trained modules, for an error message."""
    selected = _selection_of(adapter)
    if selected is None:
        return []
    return [
        f"the adapter has no {key}, but other weights of its fully trained module"
        for found, lacking in _trained_modules(names, adapter, selected).values()
        for key in lacking
        if found
    ]


def _trained_modules(
    names: ModuleNames, adapter: AdapterData, selected: PeftSelection
) -> dict[str, tuple[list[str], list[str]]]:
    """Return the fully trained modules of a model that have weights of their own.

    Each has the keys of those weights that the adapter has, and of those that it lacks.
    """
    if not selected.fully_trained:
        return {}
    adapted = {names.paths.get(module) for module in adapter.layers}
    modules: dict[str, tuple[list[str], list[str]]] = {}
    for weight in names.weights:
        module = weight.key.rpartition(".")[0]
        if weight.path not in adapted and any(map(selected.trains, with_parents([module]))):
            keys = modules.setdefault(module, ([], []))
            present = any(key in adapter.weights for key in (weight.key, *weight.old_keys))
            keys[0 if present else 1].append(weight.key)
    return modules


def _selection_of(adapter: AdapterData) -> PeftSelection | None:
    """Return what the file's config selects, unless the adapter was changed since."""
    given = adapter.selection
    same = given is not None and given.layers == adapter.layers.keys()
    return given.modules if given is not None and same else None


def _listed(modules: list[str]) -> str:
    more = f" and {len(modules) - _MAX_LISTED} more" if len(modules) > _MAX_LISTED else ""
    return ", ".join(modules[:_MAX_LISTED]) + more
