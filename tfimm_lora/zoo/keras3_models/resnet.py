"""ResNet and ResNet-D: ``keras_hub.models.ResNetImageClassifier``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    models = keras_hub_models("ResNet")
    backbone = models.ResNetBackbone(
        stackwise_num_strides=[1, 2, 2, 2],
        image_shape=shape,
        **{"stackwise_num_filters": [64, 128, 256, 512], **arguments},
    )
    return models.ResNetImageClassifier(backbone, classes)
