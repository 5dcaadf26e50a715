"""Open presets of keras_hub, and checkpoints of other libraries that keras_hub converts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import uses_legacy_keras
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.zoo.keras3_models.folders import PRESETS, folder_kind

#: The prefix of the names of presets that keras_hub downloads.
HUB = "hub/"

_HUGGING_FACE = re.compile(r"(hf[-_]hub|hf):(//)?", re.IGNORECASE)


class Normalization(NamedTuple):
    """The preprocessing of an ``ImageConverter``.

    Attributes:
        mean, std: One number per channel, for images in [0, 1].
        interpolation: The interpolation with which it resizes.
        size: The height and width, or None if it does not resize.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    size: tuple[int, int] | None


class Preset(NamedTuple):
    """An opened preset.

    Attributes:
        model: A functional model of images.
        converter: The ``ImageConverter`` of the preset, or None.
        has_classifier: Whether the model returns the scores of classes, of a picture or of its
            pixels. Otherwise it returns the features of a backbone.
    """

    model: Any
    converter: Any
    has_classifier: bool


def is_preset(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a preset: "hub/NAME", a folder, or "hf://USER/REPOSITORY"."""
    name = os.fspath(name)
    if name.startswith(HUB) and not os.path.exists(name):
        return True
    return bool(_HUGGING_FACE.match(name)) or folder_kind(name) in PRESETS


def repository_of(name: str) -> str | None:
    """Return "USER/REPOSITORY" of a name "hf://USER/REPOSITORY", or None."""
    found = _HUGGING_FACE.match(name)
    return name[found.end() :] if found else None


def open_preset(
    name: str | os.PathLike[str],
    *,
    load_weights: bool = True,
    input_size: tuple[int, int] | None = None,
    dense: bool = False,
) -> Preset:
    """Open a preset of keras_hub.

    Args:
        name: "hub/NAME" for a preset that keras_hub downloads, a folder, or
            "hf://USER/REPOSITORY". Folders and repositories may be of keras_hub, or of
            transformers or timm where keras_hub has a converter; torch is not needed.
        load_weights: Whether to load the weights. With False they are random.
        input_size: The height and width of the images. Default: those of the preset.
        dense: Whether to open a segmenter, or else the backbone, instead of a classifier.

    Raises:
        RuntimeError: If this process runs legacy Keras.
        ImportError: If keras_hub is not installed.
        ValueError: If there is no such preset, or if it is not a model of images.
    """
    name = os.fspath(name)
    if uses_legacy_keras():
        raise RuntimeError(
            f"Received {name!r}, a model for keras_hub, which needs Keras 3, but this process "
            "uses legacy Keras. Set the environment variable TF_USE_LEGACY_KERAS=0 before "
            "TensorFlow is imported."
        )
    hub = require("keras_hub", extra="hub", why=f"The model {name}")
    source = _source(hub, name)
    arguments: dict[str, Any] = {"load_weights": load_weights}
    if input_size is not None:
        arguments["image_shape"] = (*input_size, 3)
    kind = hub.models.ImageSegmenter if dense else hub.models.ImageClassifier
    task = _task(kind, name, source, arguments)
    if task is not None:
        converter = getattr(task.preprocessor, "image_converter", None)
        return Preset(task, converter, True)
    backbone = _loaded(name, hub.models.Backbone.from_preset, source, arguments)
    return Preset(backbone, _converter(hub, source), False)


def _source(hub: Any, name: str) -> str:
    """The name as keras_hub takes it."""
    if name.startswith(HUB) and not os.path.exists(name):
        short = name[len(HUB) :]
        known = list(hub.models.Backbone.presets)
        for task in (hub.models.ImageClassifier, hub.models.ImageSegmenter):
            known += [p for p in task.presets if p not in known]
        if short not in known:
            near = ", ".join(HUB + x for x in close_names(short, known, 3))
            raise ValueError(
                f"Received {name!r}; expected the name of a preset of keras_hub behind "
                f"{HUB!r}. " + (f"Nearest: {near}. " if near else "") + "See "
                "keras_hub.models.Backbone.presets."
            )
        return short
    return _HUGGING_FACE.sub("hf://", name) if _HUGGING_FACE.match(name) else name


def _task(kind: Any, name: str, source: str, arguments: dict[str, Any]) -> Any:
    """The classifier or segmenter of a preset, or None if it has only a backbone."""
    try:
        return _loaded(name, kind.from_preset, source, arguments)
    except FileNotFoundError as error:
        if "preset directory" in str(error):  # of the preprocessor of a classifier
            return None
        raise
    except TypeError as error:
        if "num_classes" in str(error):  # a required argument, which a backbone does not have
            return None
        raise
    except ValueError as error:
        if "subclass" in str(error.__cause__ or error):
            return None
        raise


def _loaded(name: str, load: Callable[..., Any], source: str, arguments: dict[str, Any]) -> Any:
    try:
        return load(source, **arguments)
    except ValueError as error:
        # The next paragraph lists all layers whose weights are missing.
        reason = str(error).strip().partition("\n\n")[0]
        advice = ""
        if "built=False" in str(error) or "could not be loaded" in reason:
            advice = " A segmenter is opened for --task segmentation (dense=True) only."
        raise ValueError(
            f"Received {name!r}, which keras_hub cannot open: {reason}{advice}"
        ) from error


def _converter(hub: Any, source: str) -> Any:
    try:
        return hub.layers.ImageConverter.from_preset(source)
    except (FileNotFoundError, ValueError):
        return None


def converter_normalization(converter: Any, channels: int) -> Normalization:
    """The preprocessing of keras_hub's ``ImageConverter``: scale * image + offset."""
    scale = _per_channel(converter.scale, 1.0, channels)
    offset = _per_channel(converter.offset, 0.0, channels)
    std = 1 / (255 * scale)
    size = tuple(converter.image_size or ())
    return Normalization(
        tuple((-offset * std).round(9).tolist()),
        tuple(std.round(9).tolist()),
        str(getattr(converter, "interpolation", "bilinear")),
        (int(size[0]), int(size[1])) if len(size) == 2 else None,
    )


def _per_channel(value: Any, default: float, channels: int) -> Any:
    given = np.asarray(default if value is None else value, "float64")
    return np.broadcast_to(given.reshape(-1), (channels,))
