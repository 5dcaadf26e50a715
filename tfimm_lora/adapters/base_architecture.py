"""Whether the base model that an adapter names has the architecture of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.model.state import RANDOM
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


def architecture_differences(model: Any, adapter: AdapterData) -> list[str]:
    """Compare the base model of an adapter with a tfimm model.

    This check is needed because a larger model often has all layers of a smaller one, with the
    same shapes.

    Returns:
        The differences, for an error message. Empty if the architectures are the same, or if
        one of them is not known by name.
    """
    mine = getattr(getattr(model, "cfg", None), "name", "")
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


def _structure(tfimm: Any, name: str) -> dict[str, Any]:
    """Return the class of a named model and the config fields that determine its layers."""
    cfg = tfimm.models.model_config(name)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    plain = {field: value for field, value in fields.items() if field not in _IGNORED_FIELDS}
    return {"class": tfimm.models.model_class(name).__name__, **plain}
