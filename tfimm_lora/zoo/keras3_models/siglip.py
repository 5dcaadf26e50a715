"""The image encoder of SigLIP: ``keras_hub.models.SigLIPVisionEncoder`` with a classifier.

The tokens are pooled by attention with one learned query.
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models, with_classifier

ALLOWS_NO_CLASSES = True

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    backbone = keras_hub_models("SigLIP").SigLIPVisionEncoder(image_shape=shape, **arguments)
    inputs = keras.Input(shape)
    outputs = backbone({"images": inputs})
    return with_classifier(keras, inputs, outputs, classes)
