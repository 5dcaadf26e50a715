"""MobileNetV3 with torch's padding: ``keras_hub.models.MobileNetImageClassifier``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    models = keras_hub_models("MobileNetV3")
    arguments = dict(arguments)
    features = arguments.pop("num_features")
    backbone = models.MobileNetBackbone(
        **arguments, output_num_filters=features, image_shape=shape
    )
    return models.MobileNetImageClassifier(backbone, classes, num_features=features)
