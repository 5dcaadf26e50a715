"""DINOv2, also with registers: ``keras_hub.models.DINOV2Backbone`` with a classifier.

With registers, timm's class token has no position embedding; here its row of the table is
zero in timm's models.
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import Shape, keras_hub_models, with_classifier

ALLOWS_NO_CLASSES = True

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    arguments = dict(arguments)
    registers, swiglu = arguments.pop("registers"), arguments.pop("swiglu")
    backbone = keras_hub_models("DINOv2").DINOV2Backbone(
        image_shape=shape,
        # Of the size of the images, so that it is not resized in each call.
        position_embedding_shape=shape,
        intermediate_dim=arguments.pop("mlp_dim"),
        layer_scale_init_value=1e-5,
        num_register_tokens=registers,
        use_mask_token=False,
        use_swiglu_ffn=swiglu,
        **arguments,
    )
    inputs = keras.Input(shape)
    outputs = backbone({"images": inputs})[:, 0]
    return with_classifier(keras, inputs, outputs, classes)
