"""Whether an adapter was trained on the architecture of a model, as far as names tell."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.zoo.tfimm_models import import_tfimm
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS

#: Fields of tfimm's configs that change nothing about which layers there are.
_FREE = frozenset(
    (
        *("name", "url", "nb_classes", "in_channels", "input_size", "test_input_size"),
        *("mean", "std", "crop_pct", "interpolation", "interpolate_input", "pool_size"),
        *("drop_rate", "drop_path_rate", "attn_drop_rate", "first_conv", "classifier"),
        *("init_scale", "init_values", "nlhb", "zero_init_last_bn", "fixed_input_size"),
    )
)


def differences(model: Any, adapter: AdapterData) -> list[str]:
    """How the architecture that an adapter names differs from that of a tfimm model.

    The layers of a smaller model are often found in a larger one, in the same shapes. Empty
    where the two are alike, or where one of them is not known by name.
    """
    mine = getattr(getattr(model, "cfg", None), "name", "")
    named = adapter.base_model.removeprefix("timm/")
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
    """The class of a named model and the fields of its config that its layers depend on."""
    cfg = tfimm.models.model_config(name)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    plain = {field: value for field, value in fields.items() if field not in _FREE}
    return {"class": tfimm.models.model_class(name).__name__, **plain}
