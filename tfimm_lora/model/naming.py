"""The family of a model, and the names of its layers in its library and in timm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tfimm_lora.backend import backend_of
from tfimm_lora.config import Targets, with_default
from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import APPLICATIONS, KERAS_HUB, TIMM, Family
from tfimm_lora.families.recognize import DECODER, Naming, family_of_timm, recognize
from tfimm_lora.families.templates import Name, Template
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
        family = _of_tfimm(model)
        return None if family is None else Naming(family, TIMM).with_depths(names.values())
    found = _by_name(model, _of_keras(model, names), names)
    heads = classifier_paths(model)
    if found is None or len(heads) != 1 or found.to_timm(names[heads[0]]) is not None:
        return found
    return replace(found, head=names[heads[0]])


def _by_name(model: Any, found: Naming | None, names: Mapping[str, str]) -> Naming | None:
    """Return the naming of the family of a model's timm name, if it has the same layers.

    Some variants differ in timm only.
    """
    cfg = getattr(model, "cfg", None)
    name = getattr(cfg, "architecture", "") or getattr(cfg, "name", "")
    family = family_of_timm(name) if name else None
    if found is None or family is None or family is found.family:
        return found
    named = replace(found, family=family)
    return named if _count(named, names.values()) >= _count(found, names.values()) else found


def _of_tfimm(model: Any) -> Family | None:
    classes = {cls.__name__ for cls in type(model).__mro__}
    families = [family for family in FAMILIES if family.tfimm in classes]
    named = family_of_timm(getattr(model.cfg, "name", ""))
    if named in families or not families:
        return named if named in families else None
    # The general family is the last. ViT with two classifiers is DeiT.
    return families[0 if getattr(model.cfg, "distilled", False) else -1]


def _of_keras(model: Any, names: Mapping[str, str]) -> Naming | None:
    layers = [*backend_of(model).walk(model)]
    backbones = [
        _in_keras_hub(family, layer, path, layers, names).with_depths(names.values())
        for path, layer in layers
        if _is_of_keras_hub(type(layer))
        for family in reversed(FAMILIES)
        if _is_backbone(layer, family, names)
    ]
    adaptable = [
        names[path]
        for path, layer in layers
        if (isinstance(layer, LoRALayer) or supported(layer))
        and not names[path].startswith(f"{DECODER}.")
    ]
    if backbones:  # some share a class in keras_hub, so the one that has the most layers
        found = max(backbones, key=lambda x: (_count(x, names.values()), len(x.family.needs)))
        # Of BASNet's encoder only the stem: its blocks are parts of other models.
        if _count(found, adaptable) > 1:
            return found
    if len(adaptable) < _MIN_KNOWN:
        return None
    recognized = recognize(adaptable, libraries=(APPLICATIONS,))
    if recognized is None:
        return None
    others = [name for name in adaptable if recognized.to_timm(name) is None]
    if len(adaptable) - len(others) < _MIN_KNOWN:
        return None
    return recognized if len(others) <= min(_MAX_OTHERS, len(adaptable) // 4) else None


def _count(naming: Naming, names: Iterable[str]) -> int:
    return sum(naming.to_timm(name) is not None for name in names)


def _is_of_keras_hub(cls: type) -> bool:
    """Whether a class or one of its bases is of keras_hub."""
    return any(base.__module__.startswith("keras_hub") for base in cls.__mro__)


def _is_backbone(layer: Any, family: Family, names: Mapping[str, str]) -> bool:
    classes = {cls.__name__ for cls in type(layer).__mro__ if _is_of_keras_hub(cls)}
    return not classes.isdisjoint(family.keras_hub) and all(
        need[1:] in names.values() if need.startswith("/") else getattr(layer, need, None)
        for need in family.needs
    )


def _in_keras_hub(
    family: Family,
    backbone: Any,
    path: str,
    layers: list[tuple[str, Any]],
    names: Mapping[str, str],
) -> Naming:
    """Return the naming of a model with this backbone at this path.

    A model of its features, as in Depth Anything, may hold its layers under another path.
    """
    paths = {id(layer): path for path, layer in layers}
    counts: Counter[str] = Counter()
    for inside, layer in backend_of(backbone).walk(backbone):
        outside = paths.get(id(layer), "")
        if inside and f"/{outside}".endswith(f"/{inside}"):
            counts[outside[: -len(inside)].rstrip("/")] += 1
    holder = max(counts, key=lambda x: (counts[x], x == path)) if counts else path
    prefix = f"{names[holder]}." if holder else ""
    # The layers of the encoders of CLIP and SigLIP begin with the name of a named encoder.
    longer = f"{prefix}{backbone.name}_"
    found = family.names(KERAS_HUB)
    if any(
        x.startswith(longer) and found.to_timm(Name(x[len(longer) :])) for x in names.values()
    ):
        prefix = longer
    renamed = {}
    for template in family.numbered:
        pattern = Template(template).pattern()
        own = [x for x in names.values() if re.fullmatch(re.escape(prefix) + pattern, x)]
        for index, name in enumerate(own):
            renamed[name] = prefix + template.replace("{s}", str(index))
    return Naming(family, KERAS_HUB, prefix, renamed=renamed)


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
