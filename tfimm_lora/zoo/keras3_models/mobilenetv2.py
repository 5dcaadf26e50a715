"""MobileNetV2: ``keras.applications`` with torch's padding and epsilon."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, set_epsilon, with_torch_padding

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    model = keras.applications.MobileNetV2(
        alpha=arguments["alpha"],
        weights=None,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )
    model = with_torch_padding(keras, model)
    set_epsilon(keras, model, 1e-5)
    return model
