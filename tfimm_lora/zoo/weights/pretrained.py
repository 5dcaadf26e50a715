"""A tfimm model with the weights that its name stands for."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.backend import installed
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.weights.hub_ids import TORCH_FILES, WITHOUT_WEIGHTS, hub_id
from tfimm_lora.zoo.weights.load import PREPROCESSING_FIELDS, load_timm_weights


def create_pretrained(tfimm: Any, model_name: str, **kwargs: Any) -> Any:
    """What ``tfimm.create_model(model_name, pretrained=True, **kwargs)`` gives.

    A model in tfimm's own cache comes first. Otherwise the checkpoint of the hub that the
    name stands for (``names.py``) is loaded, without torch. Names that are not in our
    tables, which somebody else registered, go tfimm's own way.
    """
    if tfimm.utils.cached_model_path(model_name):
        return tfimm.create_model(model_name, True, **kwargs)
    source = hub_id(model_name)
    if source is not None:
        return _created_from(tfimm, model_name, source, kwargs)
    if model_name in WITHOUT_WEIGHTS:
        raise ValueError(
            f"Received model_name={model_name!r} with pretrained=True, but there are no "
            f"weights for it: {WITHOUT_WEIGHTS[model_name]}."
        )
    if model_name in TORCH_FILES and not installed("torch"):
        raise ImportError(
            f"The weights of {model_name!r} are published as a torch file only, and torch, "
            "which reads it, is not installed. Install it with: pip install torch"
        )
    return tfimm.create_model(model_name, True, **kwargs)


def create_from_file(
    tfimm: Any, model_name: str, path: str | os.PathLike[str], **kwargs: Any
) -> Any:
    """The model of a name and arguments with a local checkpoint that is made for it."""
    model = load_timm_weights(tfimm.create_model(model_name, **kwargs), path)
    for name in PREPROCESSING_FIELDS:
        if name in kwargs:
            setattr(model.cfg, name, kwargs[name])
    return model


def _created_from(tfimm: Any, model_name: str, source: str, kwargs: dict[str, Any]) -> Any:
    """The model as its name says, and from it the one with the arguments asked for."""
    model = load_timm_weights(tfimm.create_model(model_name), source)
    told = {n: getattr(model.cfg, n) for n in PREPROCESSING_FIELDS if hasattr(model.cfg, n)}
    asked = {key: value for key, value in kwargs.items() if value is not None}
    if all(getattr(model.cfg, key, None) == value for key, value in asked.items()):
        return model
    changed = tfimm.create_model(model_name, **{**told, **asked})
    transfer_weights(model, changed)
    return changed
