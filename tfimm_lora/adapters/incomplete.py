"""Layers and weights that the config of an adapter selects in a model, but its file lacks.

The file may be damaged, or of a smaller model of the same family, whose layers a larger model
has too.
"""

from __future__ import annotations

import warnings

from tfimm_lora.adapters.adapter_data import AdapterData, FileSelection
from tfimm_lora.adapters.translation import names_in
from tfimm_lora.peft.matching import with_parents
from tfimm_lora.zoo.weights.module_names import ModuleNames

#: The number of layers that a warning lists.
_MAX_LISTED = 10


def warn_if_incomplete(names: ModuleNames, adapter: AdapterData, stacklevel: int) -> None:
    """Warn of modules that the config selects and the file lacks, and of the reverse.

    PEFT warns of the former too, and ignores the latter.
    """
    file = _selection_of(adapter)
    if file is None:
        return
    selected = file.modules
    trained = _trained_modules(names, adapter, file)
    missing = [module for module, (found, _) in trained.items() if not found]
    extra = []
    if selected.targets is not None and not selected.is_all_linear:
        missing += _missing_layers(names, adapter, file)
        extra = sorted(module for module in file.file_layers if not selected.adapts(module))
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
    file = _selection_of(adapter)
    if file is None:
        return []
    return [
        f"the adapter has no {key}, but other weights of its fully trained module"
        for found, lacking in _trained_modules(names, adapter, file).values()
        for key in lacking
        if found
    ]


def _missing_layers(names: ModuleNames, adapter: AdapterData, file: FileSelection) -> list[str]:
    """Return the layers of a model that the config selects and the file lacks.

    They have the names of the file, where one layer of the model may be three.
    """
    adapted = {names.paths.get(module) for module in adapter.layers}
    missing: dict[str, None] = {}
    for path, module in names.modules.items():
        if not names.is_adaptable(path):
            continue
        if file.renaming is None:
            lacking = [] if path in adapted else [module]
        else:
            lacking = [
                name
                for name in names_in(file.renaming.source, file.renaming.target, module)
                if name not in file.renaming.layers
            ]
        missing.update(dict.fromkeys(filter(file.modules.adapts, lacking)))
    return list(missing)


def _trained_modules(
    names: ModuleNames, adapter: AdapterData, file: FileSelection
) -> dict[str, tuple[list[str], list[str]]]:
    """Return the fully trained modules of a model that have weights of their own.

    Each has the keys of those weights that the adapter has, and of those that it lacks.
    """
    selected, renaming = file.modules, file.renaming
    if not selected.fully_trained:
        return {}
    adapted = {names.paths.get(module) for module in adapter.layers}
    modules: dict[str, tuple[list[str], list[str]]] = {}
    for weight in names.weights:
        in_file = [weight.key]
        if renaming is not None:
            in_file = names_in(renaming.source, renaming.target, weight.key, is_weight=True)
        inside = with_parents(key.rpartition(".")[0] for key in in_file)
        if weight.path not in adapted and any(map(selected.trains, inside)):
            keys = modules.setdefault(weight.key.rpartition(".")[0], ([], []))
            present = any(key in adapter.weights for key in (weight.key, *weight.old_keys))
            keys[0 if present else 1].append(weight.key)
    return modules


def _selection_of(adapter: AdapterData) -> FileSelection | None:
    """Return what the file's config selects, unless the adapter was changed since."""
    given = adapter.selection
    return given if given is not None and given.layers == adapter.layers.keys() else None


def _listed(modules: list[str]) -> str:
    more = f" and {len(modules) - _MAX_LISTED} more" if len(modules) > _MAX_LISTED else ""
    return ", ".join(modules[:_MAX_LISTED]) + more
