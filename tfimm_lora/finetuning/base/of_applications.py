"""Open a model of ``keras.applications``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.base.downloads import downloading
from tfimm_lora.finetuning.base.early import not_in_keras3
from tfimm_lora.finetuning.base.names import APPLICATIONS, unknown_model
from tfimm_lora.finetuning.base.opened import BaseModel, Size
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.new_classifier import initialize_classifier
from tfimm_lora.model.state import random_weights, record_base_name
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.model_table import applications_table

#: The number of classes of ImageNet, for which all of them have weights.
_CLASSES = 1000

#: The input size of models that take pictures of any size: that of their weights.
_SIDE = 224

_CACHE = (
    "They are downloaded once: start the command with a connection, or copy the folder "
    "~/.keras/models of another machine (KERAS_HOME)."
)


def applications() -> dict[str, Callable[..., Any]]:
    """The functions of ``keras.applications`` that create a model, by name."""
    module = default_backend().keras.applications
    public = {name: getattr(module, name) for name in dir(module) if name[0].isupper()}
    return {name: create for name, create in public.items() if callable(create)}


def open_application(
    name: str, classes: int | None, pretrained: bool, weights: Any, input_size: Size
) -> BaseModel:
    """Create a model of ``keras.applications``; see ``open_base_model``."""
    known, short = applications(), name[len(APPLICATIONS) :]
    if short not in known:
        if short in applications_table():
            raise not_in_keras3(name)
        raise unknown_model(name)
    create = known[short]
    given = os.fspath(weights) if weights is not None else "imagenet" if pretrained else None
    takes_any = short in applications_table() and None in applications_table()[short].input_size
    size = input_size or ((_SIDE, _SIDE) if takes_any else None)
    shape = (*size, 3) if size else None
    count = _CLASSES if classes is None else classes

    def with_random_weights() -> Any:
        model = create(
            weights=None, classifier_activation=None, classes=count, input_shape=shape
        )
        initialize_classifier(model)
        return model

    if given is None:
        model = with_random_weights()
    else:
        with downloading(name, _CACHE):
            model = create(weights=given, classifier_activation=None)
        if count != _CLASSES or shape is not None:
            source, model = model, with_random_weights()
            head = [f"^{path}/" for path in classifier_paths(model)]
            transfer_weights(source, model, head if count != _CLASSES else None)
    file = os.path.basename(os.path.abspath(weights)) if weights is not None else None
    text = f"weights of {file}" if file else "pretrained weights of ImageNet"
    record_base_name(
        model, file or (_public(short) if pretrained else random_weights(_public(short)))
    )
    return BaseModel(
        model,
        _preprocessing_of(create, model),
        new_classifier=count != _CLASSES,
        from_scratch=given is None,
        weights="random weights" if given is None else text,
    )


def _public(short: str) -> str:
    """The name of a model in adapters; "applications/X" would look like a hub repository."""
    return f"keras.applications.{short}"


def _preprocessing_of(create: Any, model: Any) -> Preprocessing:
    """The preprocessing that the ``preprocess_input`` of a model's module computes.

    It is linear in each channel, so it is determined by its results for black and white. Its
    result for red shows the order of the channels.
    """
    prepare = sys.modules[create.__module__].preprocess_input
    black: Any = np.zeros((1, 1, 1, 3), "float32")
    red = np.array([[[[255, 0, 0]]]], "float32")
    offset = np.asarray(prepare(black.copy()), "float64").ravel()
    moved = np.asarray(prepare(red.copy()), "float64").ravel() - offset
    channel = int(np.abs(moved).argmax())
    white = np.asarray(prepare(np.full_like(black, 255)), "float64").ravel()
    std = 1 / (white - offset)
    height, width = (int(side) for side in model.input_shape[1:3])
    return Preprocessing(
        (height, width),
        mean=tuple((-offset * std).round(6).tolist()),
        std=tuple(std.round(9).tolist()),
        interpolation="bilinear",
        channel_order="rgb" if channel == 0 else "bgr",
    )
