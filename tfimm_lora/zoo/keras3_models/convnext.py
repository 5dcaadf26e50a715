"""ConvNeXt: ``keras.applications``, whose order of pooling and normalization is timm's."""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, applications_module

#: The paths of the classifier layers.
CLASSIFIER = ("convnext_head_dense",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    return applications_module(keras, "ConvNeXtTiny").ConvNeXt(
        **arguments,
        name="convnext",
        include_preprocessing=False,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )
