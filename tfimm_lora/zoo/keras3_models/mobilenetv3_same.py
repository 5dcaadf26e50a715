"""MobileNetV3 with TensorFlow's padding, timm's ``tf_mobilenetv3``: ``keras.applications``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape

#: The paths of the classifier layers.
CLASSIFIER = ("logits",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    function = "MobileNetV3Large" if arguments["large"] else "MobileNetV3Small"
    return getattr(keras.applications, function)(
        alpha=arguments["alpha"],
        minimalistic=arguments["minimalistic"],
        include_preprocessing=False,
        dropout_rate=0.0,
        weights=None,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )
