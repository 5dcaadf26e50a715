"""Swin Transformer: ``keras_hub.models.SwinTransformerImageClassifier``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    least = arguments["patch_size"] * 2 ** (len(arguments["depths"]) - 1)
    window = least * arguments["window_size"]
    if any(side % window for side in shape[:2]):
        raise ValueError(
            f"Received input_size={shape[:2]}; expected multiples of {window} pixels: "
            f"keras_hub's Swin has windows of {arguments['window_size']} in every stage."
        )
    models = keras_hub_models("Swin")
    backbone = models.SwinTransformerBackbone(image_shape=shape, drop_path=0.0, **arguments)
    return models.SwinTransformerImageClassifier(backbone, classes)
