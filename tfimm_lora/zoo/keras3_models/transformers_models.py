"""Models of transformers for which keras_hub has no converter, by their config.json.

ConvNeXt is built with ``keras.applications``, ResNet with keras_hub. The defaults are those of
``ConvNextConfig`` and ``ResNetConfig``, since transformers omits fields with default values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tfimm_lora.zoo.keras3_models.known import KnownModel3, known, known_with
from tfimm_lora.zoo.weights.labels import labels_of

#: The number of classes of a config without names of classes.
_DEFAULT_CLASSES = 2
#: The width of the first stage of keras_hub's ResNet.
_RESNET_WIDTH = 64


def of_transformers(name: str, config: Mapping[str, Any]) -> KnownModel3 | None:
    """Return how to build the model of a config.json of transformers.

    Args:
        name: The name of the folder or repository, for the model and messages.
        config: The content of its config.json.

    Returns:
        The model, with 0 classes if it has no classifier. None if keras_hub converts the
        checkpoints of this kind of model, or if nobody does.

    Raises:
        ValueError: If the model has settings that Keras 3 cannot build.

    Example:
        >>> from tfimm_lora.zoo.keras3_models.transformers_models import of_transformers
        >>> found = of_transformers("mine", {"model_type": "convnext", "depths": [3, 3, 27, 3]})
        >>> found.config.architecture, found.config.nb_classes, found.arguments["depths"]
        ('convnext_small', 0, [3, 3, 27, 3])
    """
    if config.get("model_type") not in _ARGUMENTS:
        return None
    family, likeness, arguments_of = _ARGUMENTS[config["model_type"]]
    arguments = arguments_of(name, config)
    row = known_with(family, arguments)
    like = known(likeness).config
    kinds = config.get("architectures") or []
    has_classifier = any(str(x).endswith("ForImageClassification") for x in kinds)
    labels = labels_of(dict(config))
    classes = len(labels) if labels else int(config.get("num_labels", _DEFAULT_CLASSES))
    size = int(config.get("image_size") or like.input_size[0])
    return KnownModel3(
        replace(
            like,
            name=name,
            architecture=row or "",
            nb_classes=classes if has_classifier else 0,
            input_size=(size, size),
        ),
        family,
        arguments,
        0,
        "",
    )


def _convnext(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    _require(name, config, {"hidden_act": "gelu", "patch_size": 4, "num_channels": 3})
    arguments: dict[str, Any] = {
        "depths": list(config.get("depths", (3, 3, 9, 3))),
        "projection_dims": list(config.get("hidden_sizes", (96, 192, 384, 768))),
    }
    if config.get("layer_scale_init_value", 1e-6) <= 0:  # then there is no such parameter
        arguments["layer_scale_init_value"] = None
    return arguments


def _resnet(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {
        "hidden_act": "relu",
        "num_channels": 3,
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    _require(name, config, fixed)
    is_basic = config.get("layer_type", "bottleneck") == "basic"
    widths = config.get("hidden_sizes", (256, 512, 1024, 2048))
    arguments: dict[str, Any] = {
        "input_conv_filters": [config.get("embedding_size", 64)],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_blocks": list(config.get("depths", (3, 4, 6, 3))),
        "block_type": "basic_block" if is_basic else "bottleneck_block",
    }
    filters = [width if is_basic else width // 4 for width in widths]
    if filters[0] != _RESNET_WIDTH:
        raise ValueError(
            f"Received {name!r}, whose config.json has hidden_sizes={list(widths)}; expected "
            f"{_RESNET_WIDTH if is_basic else 4 * _RESNET_WIDTH} as the first of them, with "
            "which alone keras_hub builds a ResNet."
        )
    if filters != [64, 128, 256, 512]:
        arguments["stackwise_num_filters"] = filters
    return arguments


def _require(name: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise if a field has another value than the only one that can be built."""
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"Received {name!r}, whose config.json has {field}={config[field]!r}; expected "
                f"{field}={value!r}, with which alone the model can be built on Keras 3."
            )


_Arguments = Callable[[str, Mapping[str, Any]], dict[str, Any]]

#: model_type -> the family here, a named model with the usual preprocessing, the arguments.
_ARGUMENTS: dict[str, tuple[str, str, _Arguments]] = {
    "convnext": ("convnext", "convnext_tiny", _convnext),
    "resnet": ("resnet", "resnet50", _resnet),
}
