"""DeiT with distillation: ``keras_hub.models.DeiTBackbone`` with both heads.

The classifier of keras_hub has one head. The logits are the mean of both, as in timm and
transformers; tfimm returns them separately.
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models

#: The paths of the classifier layers.
CLASSIFIER = ("predictions", "predictions_distillation")


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    arguments = dict(arguments)
    backbone = keras_hub_models("DeiT").DeiTBackbone(
        image_shape=shape,
        intermediate_dim=arguments.pop("mlp_dim"),
        layer_norm_epsilon=arguments.pop("epsilon"),
        **arguments,
    )
    inputs = keras.Input(shape)
    tokens = backbone(inputs)
    heads = [
        keras.layers.Dense(classes, name=name)(tokens[:, position])
        for position, name in enumerate(CLASSIFIER)
    ]
    return keras.Model(inputs, keras.layers.Average(name="mean_of_heads")(heads))
