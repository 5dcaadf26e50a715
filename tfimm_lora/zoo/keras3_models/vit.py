"""ViT, and DeiT without distillation: ``keras_hub.models.ViTImageClassifier``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

ALLOWS_NO_CLASSES = True

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    models = keras_hub_models("ViT")
    arguments = dict(arguments)
    epsilon = arguments.pop("epsilon")
    backbone = models.ViTBackbone(image_shape=shape, layer_norm_epsilon=epsilon, **arguments)
    if not classes:
        return keras.Model(backbone.input, backbone.output[:, 0])
    return models.ViTImageClassifier(backbone, classes, pooling="token")
