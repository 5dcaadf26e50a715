"""The image encoder of CLIP: ``keras_hub.models.CLIPVisionEncoder`` with a classifier.

As in timm, the classifier has the class token after the last normalization. The activation of
the MLPs is ``quick_gelu`` in OpenAI's models and the exact GELU in most others.
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models, with_classifier

ALLOWS_NO_CLASSES = True

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    backbone = keras_hub_models("CLIP").CLIPVisionEncoder(image_shape=shape, **arguments)
    inputs = keras.Input(shape)
    outputs = backbone({"images": inputs})[:, 0]
    return with_classifier(keras, inputs, outputs, classes)
