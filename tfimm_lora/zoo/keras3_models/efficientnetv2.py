"""EfficientNetV2: ``keras.applications``, which pads as TensorFlow."""

from __future__ import annotations

import copy
from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, applications_module

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    module = applications_module(keras, "EfficientNetV2B0")
    name = "efficientnetv2-" + arguments["variant"].lower()
    width, depth = _COEFFICIENTS[arguments["variant"]]
    return module.EfficientNetV2(
        width,
        depth,
        shape[0],
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        blocks_args=copy.deepcopy(module.DEFAULT_BLOCKS_ARGS[name]),
        name=name,
        include_preprocessing=False,
        weights=None,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )


#: The coefficients of width and depth.
_COEFFICIENTS = {
    "B0": (1.0, 1.0),
    "B1": (1.0, 1.1),
    "B2": (1.1, 1.2),
    "B3": (1.2, 1.4),
    "S": (1.0, 1.0),
    "M": (1.0, 1.0),
    "L": (1.0, 1.0),
}
