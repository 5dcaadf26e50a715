"""Create tfimm models with pretrained weights."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.backend import installed
from tfimm_lora.model.state import copy_base_name, record_base_name
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.weights.hub_ids import TORCH_FILES, WITHOUT_WEIGHTS, hub_id
from tfimm_lora.zoo.weights.load import PREPROCESSING_FIELDS, load_timm_weights


def create_pretrained(tfimm: Any, model_name: str, **kwargs: Any) -> Any:
    """Create a tfimm model with pretrained weights, without torch where that is possible.

    A model in tfimm's own cache takes precedence. Otherwise the hub checkpoint of the name
    (``hub_ids.py``) is loaded. Names that are not in the tables, which other packages
    registered, are left to tfimm.

    Args:
        tfimm: The module tfimm.
        model_name: A name of tfimm.
        **kwargs: As for ``tfimm.create_model``.
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
            f"The weights of {model_name!r} are published as a torch file only, and torch is "
            "not installed. Install it with: pip install torch"
        )
    return tfimm.create_model(model_name, True, **kwargs)


def create_from_file(
    tfimm: Any, model_name: str, path: str | os.PathLike[str], **kwargs: Any
) -> Any:
    """Create a tfimm model with the weights of a local checkpoint for these arguments."""
    model = load_timm_weights(tfimm.create_model(model_name, **kwargs), path)
    for name in PREPROCESSING_FIELDS:
        if name in kwargs:
            setattr(model.cfg, name, kwargs[name])
    return model


def _created_from(tfimm: Any, model_name: str, source: str, kwargs: dict[str, Any]) -> Any:
    """Create the registered model with its weights, and adapt it to other arguments."""
    model = load_timm_weights(tfimm.create_model(model_name), source)
    record_base_name(model, source)
    own = {n: getattr(model.cfg, n) for n in PREPROCESSING_FIELDS if hasattr(model.cfg, n)}
    given = {key: value for key, value in kwargs.items() if value is not None}
    if all(getattr(model.cfg, key, None) == value for key, value in given.items()):
        return model
    changed = tfimm.create_model(model_name, **{**own, **given})
    transfer_weights(model, changed)
    copy_base_name(model, changed)
    return changed
