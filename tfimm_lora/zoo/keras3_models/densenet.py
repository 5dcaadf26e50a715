"""DenseNet: ``keras.applications``, with the epsilon of timm.

The DenseNet of keras_hub pads its stem as TensorFlow.
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, set_epsilon

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    model = getattr(keras.applications, f"DenseNet{arguments['variant']}")(
        weights=None, input_shape=shape, classes=classes, classifier_activation=None
    )
    set_epsilon(keras, model, 1e-5)
    return model
