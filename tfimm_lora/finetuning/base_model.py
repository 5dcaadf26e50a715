"""``open_base_model``: create or load the model to fine-tune, by name or path."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from tfimm_lora.backend import uses_legacy_keras
from tfimm_lora.finetuning.base.dense import dense_base
from tfimm_lora.finetuning.base.names import APPLICATIONS, canonical_name, is_model_file
from tfimm_lora.finetuning.base.of_applications import open_application
from tfimm_lora.finetuning.base.of_file import open_file
from tfimm_lora.finetuning.base.of_keras3 import open_keras3
from tfimm_lora.finetuning.base.of_tfimm import open_tfimm
from tfimm_lora.finetuning.base.opened import NORMALISATIONS, BaseModel, Size
from tfimm_lora.validation import check_choice
from tfimm_lora.zoo.keras3_models.folders import PRESETS, folder_kind
from tfimm_lora.zoo.keras3_models.known import is_known as is_known_on_keras3
from tfimm_lora.zoo.keras3_models.presets import is_preset


def open_base_model(
    name: str | os.PathLike[str],
    *,
    classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    input_size: Size = None,
    normalisation: str | None = None,
    dense: bool = False,
) -> BaseModel:
    """Create or load an ordinary model that returns logits.

    Args:
        name: The name of a tfimm model ("convnext_tiny"), of a model in
            ``keras.applications`` ("applications/MobileNetV2", "MobileNetV2") or of a timm
            checkpoint ("timm/resnet50.a1_in1k"); or the path of a saved model (.keras, .h5 or
            a SavedModel folder of legacy Keras). On Keras 3 also a model of timm, a preset of
            keras_hub ("hub/dinov2_base"), or a folder or repository ("hf://user/name") of
            keras_hub, timm or transformers; models that only tfimm has need legacy Keras.
        classes: The number of classes. If the model has another number, its classifier is
            replaced. Default: the number of the model.
        pretrained: Whether to load the pretrained weights of the named model.
        weights: A weight file instead: a timm checkpoint (safetensors) for a tfimm model, a
            Keras weight file for ``keras.applications``.
        input_size: The height and width of the input. Default: those of the model.
        normalisation: How pictures are normalized: "imagenet", "inception" (to [-1, 1]), "unit"
            (to [0, 1]) or "raw" ([0, 255]). Required for a saved model, unless it is a model of
            keras_hub with its preprocessor. Default: the normalization of the named model.
        dense: Whether the model returns logits for each pixel, for a segmentation: with the
            decoder of ``with_decoder``, unless it does so already. Default: False.

    Returns:
        The model with its preprocessing.

    Raises:
        ValueError: for an unknown name (the message lists similar ones), a name without
            pretrained weights, or a model that cannot be used.
        FileNotFoundError: if the file ``name`` or ``weights`` does not exist.
        ConnectionError: if the pretrained weights are not cached and cannot be downloaded.
        ImportError, RuntimeError: as ``create_model``; also if a package is missing whose
            classes are in the saved model.
    """
    if dense:
        base = _opened(name, None, pretrained, weights, input_size, normalisation, True)
        return dense_base(base, classes)
    return _opened(name, classes, pretrained, weights, input_size, normalisation, False)


def _opened(
    name: str | os.PathLike[str],
    classes: int | None,
    pretrained: bool,
    weights: Any,
    input_size: Size,
    normalisation: str | None,
    dense: bool,
) -> BaseModel:
    name = canonical_name(os.fspath(name))
    if weights is not None and not os.path.exists(weights):
        raise FileNotFoundError(
            f"Received weights={os.fspath(weights)!r}, which does not exist; expected a weight "
            "file."
        )
    if normalisation is not None:
        check_choice(normalisation, "normalisation", NORMALISATIONS)
    if is_model_file(name):
        if pretrained or weights is not None:
            raise ValueError(
                f"Received the model file {name!r} with pretrained or weights; expected "
                "neither. The file contains the weights."
            )
        if folder_kind(name) in PRESETS:
            base = open_keras3(name, classes, True, None, input_size, normalisation, dense)
        else:
            base = open_file(name, classes, normalisation, input_size)
    elif name.startswith(APPLICATIONS):
        base = open_application(name, classes, pretrained, weights, input_size)
    elif not uses_legacy_keras() and (is_known_on_keras3(name) or is_preset(name)):
        base = open_keras3(name, classes, pretrained, weights, input_size, normalisation, dense)
    else:
        base = open_tfimm(name, classes, pretrained, weights, input_size, dense)
    if normalisation is None:
        return base
    mean, std = NORMALISATIONS[normalisation]
    preprocessing = replace(base.preprocessing, mean=mean, std=std, channel_order="rgb")
    return replace(base, preprocessing=preprocessing)
