"""DINOv3: ``keras_hub.models.DINOV3Backbone`` with a classifier.

As in timm, the classifier has the mean of the patches, without the class token and the
registers.
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
    registers, gated = arguments.pop("registers"), arguments.pop("gated")
    has_bias = arguments.pop("qkv_bias")
    backbone = keras_hub_models("DINOv3").DINOV3Backbone(
        image_shape=shape,
        intermediate_dim=arguments.pop("mlp_dim"),
        layer_scale_init_value=1e-5,
        num_register_tokens=registers,
        use_mask_token=False,
        use_gated_mlp=gated,
        hidden_activation="silu" if gated else "gelu",
        use_query_bias=has_bias,
        use_key_bias=False,
        use_value_bias=has_bias,
        **arguments,
    )
    inputs = keras.Input(shape)
    patches = backbone({"pixel_values": inputs})[:, 1 + registers :]
    outputs = keras.layers.GlobalAveragePooling1D()(patches)
    return with_classifier(keras, inputs, outputs, classes)
