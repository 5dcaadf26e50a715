"""The family of a model, and the names of its layers in its library and in timm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tfimm_lora.backend import backend_of
from tfimm_lora.config import Targets, with_default
from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import APPLICATIONS, KERAS_HUB, TIMM, Family
from tfimm_lora.families.recognize import Naming, family_of_timm, recognize
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import supported
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.stable_paths import stable_paths

#: The number of layers that a backbone of keras.applications has at least. A user's own model
#: may have a few layers of the same names.
_MIN_KNOWN = 8

#: The number of layers outside of a backbone of keras.applications, such as a classifier.
_MAX_OTHERS = 3


def is_tfimm(model: Any) -> bool:
    """Whether a model is of tfimm, or its LoRA version."""
    modules = (cls.__module__.partition(".")[0] for cls in type(model).__mro__)
    return hasattr(model, "cfg") and "tfimm" in modules


def naming_of(model: Any, names: Mapping[str, str]) -> Naming | None:
    """Return the naming of a model's layers, or None if no family has them.

    Args:
        model: A built model.
        names: Path -> name in an adapter, of all layers; see ``ModuleNames``.
    """
    if is_tfimm(model):
        classes = {cls.__name__ for cls in type(model).__mro__}
        family = family_of_timm(getattr(model.cfg, "name", ""))
        if family is None or family.tfimm not in classes:
            family = next((x for x in FAMILIES if x.tfimm in classes), None)
        return None if family is None else Naming(family, TIMM).with_depths(names.values())
    found = _of_keras(model, names)
    heads = classifier_paths(model)
    if found is None or len(heads) != 1 or found.to_timm(names[heads[0]]) is not None:
        return found
    return replace(found, head=names[heads[0]])


def _of_keras(model: Any, names: Mapping[str, str]) -> Naming | None:
    layers = [*backend_of(model).walk(model)]
    backbones = [
        Naming(family, KERAS_HUB, f"{names[path]}." if path else "").with_depths(names.values())
        for family in reversed(FAMILIES)
        for path, layer in layers
        if _is_backbone(layer, family)
    ]
    if backbones:  # some share a class in keras_hub, so the one that has the most layers
        return max(
            backbones, key=lambda x: sum(x.to_timm(n) is not None for n in names.values())
        )
    adaptable = [names[p] for p, x in layers if isinstance(x, LoRALayer) or supported(x)]
    found = recognize(adaptable, libraries=(APPLICATIONS,))
    if found is None:
        return None
    others = [name for name in adaptable if found.to_timm(name) is None]
    if len(adaptable) - len(others) < _MIN_KNOWN:
        return None
    return found if len(others) <= min(_MAX_OTHERS, len(adaptable) // 4) else None


def _count(naming: Naming, names: Iterable[str]) -> int:
    return sum(naming.to_timm(name) is not None for name in names)


def _is_backbone(layer: Any, family: Family) -> bool:
    return any(
        cls.__name__ in family.keras_hub and cls.__module__.startswith("keras_hub")
        for cls in type(layer).__mro__
    )


class TimmView(NamedTuple):
    """timm's view of a Keras model: the names of its layers, and the targets of its family.

    Attributes:
        paths: Path -> timm's name with "/", without the block of a fused projection, for the
            layers that the table of the family has.
        presets: The target presets of the family.
    """

    paths: Mapping[str, str]
    presets: Mapping[str, Targets]


def timm_view(model: Any) -> TimmView | None:
    """Return timm's view of a Keras model; None if its family is not known.

    It is None for models of tfimm, whose layers have timm's names themselves.
    """
    if is_tfimm(model):
        return None
    layers = {path: layer for path, layer in backend_of(model).walk(model) if path}
    stable = stable_paths(layers)
    names = {path: stable[path].replace("/", ".") for path in layers}
    naming = naming_of(model, names)
    if naming is None:
        return None
    found = {path: naming.to_timm(name) for path, name in names.items()}
    paths = {p: name.name.replace(".", "/") for p, name in found.items() if name is not None}
    return TimmView(paths, with_default(naming.family.presets))
