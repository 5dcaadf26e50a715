"""VGG without BatchNorm: ``keras_hub.models.VGGImageClassifier``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

#: The paths of the classifier layers.
CLASSIFIER = ("head/predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    if min(shape[:2]) < 224:
        raise ValueError(
            f"Received input_size={shape[:2]}; expected at least (224, 224): the head of VGG "
            "is a convolution of 7x7 on a grid of one thirty-second of the size."
        )
    models = keras_hub_models("VGG")
    backbone = models.VGGBackbone(image_shape=shape, **arguments)
    return models.VGGImageClassifier(backbone, classes, pooling="avg")
