"""Whether the base model that an adapter names has the architecture and weights of a model."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.backend import uses_legacy_keras
from tfimm_lora.model.state import RANDOM, base_name
from tfimm_lora.zoo.keras3_models.known import is_known, known
from tfimm_lora.zoo.tfimm_models import import_tfimm
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS

#: Fields of tfimm's configs that do not change the layers of a model.
_IGNORED_FIELDS = frozenset(
    (
        *("name", "url", "nb_classes", "in_channels", "input_size", "test_input_size"),
        *("mean", "std", "crop_pct", "interpolation", "interpolate_input", "pool_size"),
        *("drop_rate", "drop_path_rate", "attn_drop_rate", "first_conv", "classifier"),
        *("init_scale", "init_values", "nlhb", "zero_init_last_bn", "fixed_input_size"),
    )
)


#: A checkpoint on the hub: "timm/resnet18.a1_in1k", "hf://user/repo@main".
_HUB_ID = re.compile(r"(?:hf(?:[-_]hub)?:(?://)?)?(?P<owner>[\w-]+)/(?P<name>[\w.-]+)(?:@.+)?")
#: What looks like the owner of a checkpoint, and names a library of models.
_LIBRARIES = ("hub", "applications")


def warn_if_other_checkpoint(model: Any, adapter: AdapterData, stacklevel: int) -> None:
    """Warn if an adapter names another checkpoint than the model was loaded from.

    Both must be ids on the hub. A mirror, whose id differs only in its owner, is the same.
    """
    mine, theirs = base_name(model) or "", adapter.base_model
    here, there = _hub_id(mine), _hub_id(theirs)
    if here is None or there is None or _may_be_the_same(here, there):
        return
    warnings.warn(
        f"The adapter was trained on {theirs!r}, and the weights of model '{model.name}' are "
        f"those of {mine!r}; expected the same checkpoint. The outputs will differ from those "
        "in training. Load the weights that the adapter names.",
        stacklevel=stacklevel + 1,
    )


def _hub_id(name: str) -> tuple[str, str] | None:
    """Return the owner and the name of a checkpoint on the hub; None if it is not one."""
    found = _HUB_ID.fullmatch(name)
    if found is None or found["owner"] in _LIBRARIES:
        return None
    return found["owner"].lower(), found["name"].lower()


def _may_be_the_same(here: tuple[str, str], there: tuple[str, str]) -> bool:
    if here[0] == there[0] == "timm":  # without a tag any of the weights may be meant
        (name, _, tag), (other, _, other_tag) = here[1].partition("."), there[1].partition(".")
        return name == other and (tag == other_tag or not tag or not other_tag)
    return here[1] == there[1]


def architecture_differences(model: Any, adapter: AdapterData) -> list[str]:
    """Compare the base model of an adapter with a model that was created by its name.

    This check is needed because a larger model often has all layers of a smaller one, with the
    same shapes.

    Returns:
        The differences, for an error message. Empty if the architectures are the same, or if
        one of them is not known by name.
    """
    mine = getattr(getattr(model, "cfg", None), "name", "")
    if not uses_legacy_keras():
        return _differences_on_keras3(mine, adapter.base_model.removesuffix(RANDOM))
    named = adapter.base_model.removesuffix(RANDOM).removeprefix("timm/")
    theirs = [name for name, tag in CHECKPOINTS.items() if named in (name, tag)]
    if not mine or not theirs or mine in theirs:
        return []
    try:
        tfimm = import_tfimm()
    except (ImportError, RuntimeError):
        return []
    if not tfimm.models.is_model(mine):
        return []
    here, there = _structure(tfimm, mine), [_structure(tfimm, name) for name in theirs]
    if here in there:
        return []
    if here["class"] != there[0]["class"]:
        return [f"it is of a {there[0]['class']}"]
    return [
        f"{field} is {there[0].get(field)!r} there, {here.get(field)!r} here"
        for field in sorted(here.keys() | there[0].keys())
        if here.get(field) != there[0].get(field)
    ]


def _differences_on_keras3(mine: str, theirs: str) -> list[str]:
    """Return the differences between two models that can be created by name on Keras 3."""
    if not (is_known(mine) and is_known(theirs)):
        return []
    here, there = known(mine), known(theirs)
    if here.family != there.family:
        return [f"it is of the family {there.family}"]
    return [
        f"{field} is {there.arguments.get(field)!r} there, {here.arguments.get(field)!r} here"
        for field in sorted(here.arguments.keys() | there.arguments.keys())
        if here.arguments.get(field) != there.arguments.get(field) and field != "epsilon"
    ]


def _structure(tfimm: Any, name: str) -> dict[str, Any]:
    """Return the class of a named model and the config fields that determine its layers."""
    cfg = tfimm.models.model_config(name)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    plain = {field: value for field, value in fields.items() if field not in _IGNORED_FIELDS}
    return {"class": tfimm.models.model_class(name).__name__, **plain}
