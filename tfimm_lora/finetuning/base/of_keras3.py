"""Open a model of timm that Keras 3 builds, or a preset of keras_hub."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.finetuning.base.downloads import downloading
from tfimm_lora.finetuning.base.early import check_preset, check_tfimm
from tfimm_lora.finetuning.base.of_file import picture_size
from tfimm_lora.finetuning.base.opened import NORMALISATIONS, BaseModel, Size
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.state import base_name, record_base_name
from tfimm_lora.zoo.keras3_models.base import create_base, picture_shape
from tfimm_lora.zoo.keras3_models.known import is_known
from tfimm_lora.zoo.keras3_models.presets import HUB

_CACHE = (
    "They are downloaded once: start the command with a connection to the hub, or copy the "
    "cache of another machine and set HF_HOME, or KAGGLEHUB_CACHE for presets (hub/NAME)."
)


def open_keras3(
    name: str,
    classes: int | None,
    pretrained: bool,
    weights: Any,
    input_size: Size,
    normalisation: str | None,
    dense: bool = False,
) -> BaseModel:
    """Create a model on Keras 3; see ``open_base_model``.

    Args:
        name: A name of tfimm or timm, or a preset: "hub/NAME", a folder or "hf://...".
        classes, pretrained, weights, input_size, normalisation: As for ``open_base_model``.
        dense: Whether a preset of a segmenter is opened as such.
    """
    if is_known(name):
        check_tfimm(name)
    else:
        check_preset(name)
    local = os.path.exists(name)
    with downloading(name, _CACHE):
        base = create_base(
            name,
            pretrained=pretrained,
            weights=weights,
            dense=dense,
            nb_classes=classes,
            input_size=input_size,
        )
    model, file = base.model, os.path.basename(os.path.abspath(weights or name))
    if weights is not None:
        record_base_name(model, file)
    # The weights of folders and repositories are always loaded.
    loaded = pretrained or weights is not None or not (is_known(name) or name.startswith(HUB))
    if not loaded:
        text = "random weights"
    elif local or weights is not None:
        text = f"weights of {file}"
    else:
        text = f"pretrained weights {base_name(model) or name}"
    return BaseModel(
        model,
        _preprocessing(name, model, normalisation, input_size, base.converter),
        new_classifier=base.new_classifier,
        from_scratch=not loaded,
        weights=text,
    )


def _preprocessing(
    name: str, model: Any, normalisation: str | None, input_size: Size, converter: Any
) -> Preprocessing:
    cfg = getattr(model, "cfg", None)
    if cfg is not None:
        return Preprocessing.of(cfg)
    if normalisation is None:
        raise ValueError(
            f"Received the model {name!r} without normalisation, which it does not store; "
            f"expected one of {', '.join(NORMALISATIONS)}. Pass the one that the model was "
            "trained with."
        )
    size, channels = picture_size(name, picture_shape(model), input_size, converter)
    mean, std = NORMALISATIONS[normalisation]
    return Preprocessing(size, mean, std, in_channels=channels, crop_pct=1.0)
