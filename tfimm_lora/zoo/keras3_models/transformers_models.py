"""Models of transformers for which keras_hub has no converter, by their config.json.

ConvNeXt is built with ``keras.applications``, ResNet with keras_hub. The defaults are those of
``ConvNextConfig`` and ``ResNetConfig``, since transformers omits fields with default values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    kind = str(config.get("model_type"))
    if kind not in _ARGUMENTS:
        return None
    family, likeness, arguments_of = _ARGUMENTS[kind]
    arguments = arguments_of(name, config)
    row = known_with(family, arguments)
    like = known(likeness).config
    names = config.get("architectures") or []
    has_classifier = any(str(x).endswith("ForImageClassification") for x in names)
    labels = labels_of(dict(config))
    classes = _integer(name, config, "num_labels", len(labels or ()) or _DEFAULT_CLASSES)
    size = _integer(name, config, "image_size", like.input_size[0])
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
        "depths": _of_stages(name, config, "depths", (3, 3, 9, 3)),
        "projection_dims": _of_stages(name, config, "hidden_sizes", (96, 192, 384, 768)),
    }
    scale = config.get("layer_scale_init_value", 1e-6)
    if not isinstance(scale, (int, float)) or scale <= 0:  # then there is no such parameter
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
    widths = _of_stages(name, config, "hidden_sizes", (256, 512, 1024, 2048))
    arguments: dict[str, Any] = {
        "input_conv_filters": [_integer(name, config, "embedding_size", 64)],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_blocks": _of_stages(name, config, "depths", (3, 4, 6, 3)),
        "block_type": "basic_block" if is_basic else "bottleneck_block",
    }
    filters = [width if is_basic else width // 4 for width in widths]
    if filters[0] != _RESNET_WIDTH:
        raise ValueError(
            f"Received {name!r}, whose config.json has hidden_sizes={widths}; expected "
            f"{_RESNET_WIDTH if is_basic else 4 * _RESNET_WIDTH} as the first of them, with "
            "which alone keras_hub builds a ResNet."
        )
    if filters != [64, 128, 256, 512]:
        arguments["stackwise_num_filters"] = filters
    return arguments


def _integer(name: str, config: Mapping[str, Any], field: str, default: int) -> int:
    """Return a field that is a positive integer; null means the default."""
    value = config.get(field)
    if value is None:
        return default
    if not _is_size(value):
        raise ValueError(
            f"Received {name!r}, whose config.json has {field}={value!r}; expected a positive "
            "integer."
        )
    return int(value)


def _of_stages(
    name: str, config: Mapping[str, Any], field: str, default: Sequence[int]
) -> list[int]:
    """Return a field with one positive integer for each of the stages."""
    value = config.get(field)
    if value is None:
        return list(default)
    if (
        not isinstance(value, list)
        or len(value) != len(default)
        or not all(map(_is_size, value))
    ):
        raise ValueError(
            f"Received {name!r}, whose config.json has {field}={value!r}; expected "
            f"{len(default)} positive integers, one for each stage."
        )
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
