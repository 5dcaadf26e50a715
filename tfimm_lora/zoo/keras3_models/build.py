"""``build``: create a model of timm on Keras 3 with keras_hub or ``keras.applications``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tfimm_lora.backend import backend_of, keras3_backend
from tfimm_lora.model.classifier import canonical_path
from tfimm_lora.model.new_classifier import initialize_classifier
from tfimm_lora.validation import check_integer
from tfimm_lora.zoo.keras3_models.known import KnownConfig, KnownModel3, known
from tfimm_lora.zoo.keras3_models.positions import (
    POSITIONS,
    renumbered_positions,
    resized_positions,
)
from tfimm_lora.zoo.weights.positions import NUMBERS, compute_positions


def build(
    name: str | KnownModel3,
    *,
    classes: int | None = None,
    input_size: tuple[int, int] | None = None,
    in_channels: int = 3,
) -> tuple[Any, KnownConfig]:
    """Create a model with random weights that has the exact architecture of timm's.

    The model has neither dropout nor stochastic depth.

    Args:
        name: A name of tfimm or timm, optionally with a tag, or what ``known`` returns for it.
        classes: The number of classes. Default: that of the named weights. With 0, which
            only ViT, DINOv2, DINOv3, CLIP and SigLIP allow, the model returns the features
            that its classifier would have.
        input_size: The height and width of the images. Default: that of the named weights.
        in_channels: The number of channels of the images. Default: 3.

    Returns:
        A functional Keras model that returns logits, and its config, which is also
        ``model.cfg``.

    Raises:
        ValueError: If Keras 3 cannot build the model exactly, or if an argument is out of
            range.
        ImportError: If the model needs keras_hub and it is not installed.

    Example:
        >>> from tfimm_lora.zoo.keras3_models.build import build
        >>> model, cfg = build("convnext_tiny", classes=5, input_size=(64, 64))
        >>> model.output_shape, cfg.mean
        ((None, 5), (0.485, 0.456, 0.406))
    """
    row = known(name) if isinstance(name, str) else name
    config = replace(
        row.config,
        nb_classes=row.config.nb_classes if classes is None else classes,
        in_channels=in_channels,
        input_size=row.config.input_size if input_size is None else _size(input_size),
        mean=_repeated(row.config.mean, in_channels),
        std=_repeated(row.config.std, in_channels),
    )
    check_integer(config.nb_classes, "nb_classes", 0)
    check_integer(in_channels, "in_channels", 1)
    family = importlib.import_module(f"{__package__}.{row.family}")
    if not config.nb_classes and not allows_no_classes(row):
        raise ValueError(
            f"Received model_name={config.name!r} with 0 classes; expected a number of "
            "classes: on Keras 3 this model has a classifier. Pass nb_classes."
        )
    patch = row.arguments.get("patch_size", 1)
    if any(side % patch for side in config.input_size):
        raise ValueError(
            f"Received input_size={config.input_size} for {config.name!r}; expected multiples "
            f"of {patch}, the size of its patches. The rest of the images would be dropped."
        )
    keras = keras3_backend().keras
    shape = (*config.input_size, in_channels)
    try:
        model = family.build(keras, row.arguments, config.nb_classes, shape)
    except ValueError as error:  # keras_hub names neither the model nor our argument
        sides = "x".join(map(str, config.input_size))
        raise ValueError(
            f"Received input_size={sides} for {config.name!r}, which cannot be built so: "
            f"{error}"
        ) from error
    if type(model) is not keras.Model:
        # The fit and predict of keras_hub's tasks need TensorFlow or grain on every framework.
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    config = replace(
        config,
        classifier=tuple(family.CLASSIFIER) if config.nb_classes else (),
        first_conv=_first_convolution(model),
        transform_weights=_position_transforms(model),
    )
    model.cfg = config
    compute_positions(model)
    initialize_classifier(model)
    return model, config


def allows_no_classes(model: KnownModel3) -> bool:
    """Whether a model can be built without a classifier, for its features."""
    family = importlib.import_module(f"{__package__}.{model.family}")
    return bool(getattr(family, "ALLOWS_NO_CLASSES", False))


def _first_convolution(model: Any) -> str:
    """The path of the convolution of the images."""
    backend = backend_of(model)
    for path, layer in backend.walk(model):
        if any(len(variable.shape) == 4 for variable in backend.own_variables(layer)):
            return canonical_path(path)
    return ""


def _position_transforms(model: Any) -> dict[str, Callable[[Any, Any, Any], Any]]:
    """The variables that depend on the size of the images, and how to fit them to another."""
    backend = backend_of(model)
    transforms: dict[str, Callable[[Any, Any, Any], Any]] = {}
    for path, layer in backend.walk(model):
        for variable in backend.own_variables(layer):
            name = f"{path}/{backend.variable_name(variable)}"
            if POSITIONS.search(name):
                transforms[name] = resized_positions
            elif name.endswith(f"/{NUMBERS}"):
                transforms[name] = renumbered_positions
    return transforms


def _size(value: Any) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(sides) != 2 or not all(isinstance(x, int) and x > 0 for x in sides):
        raise ValueError(
            f"Received input_size={value!r}; expected (height, width) in pixels, for example "
            "(224, 224)."
        )
    return (sides[0], sides[1])


def _repeated(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values[i % len(values)] for i in range(channels))
