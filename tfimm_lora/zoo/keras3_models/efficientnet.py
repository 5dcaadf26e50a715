"""EfficientNet and EfficientNet-Lite.

Those that timm calls ``tf_`` pad as TensorFlow: ``keras.applications``, also for Lite, by
giving its builder other blocks. The others pad as torch: ``keras_hub``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from tfimm_lora.zoo.keras3_models.libraries import (
    Shape,
    applications_module,
    keras_hub_models,
    without_preprocessing,
)

#: The paths of the classifier layers.
CLASSIFIER = ("predictions",)

#: Of keras_hub's backbone, as in its converter for timm's checkpoints.
_STAGES = {
    "stackwise_kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
    "stackwise_input_filters": [32, 16, 24, 40, 80, 112, 192],
    "stackwise_output_filters": [16, 24, 40, 80, 112, 192, 320],
    "stackwise_expansion_ratios": [1, 6, 6, 6, 6, 6, 6],
    "stackwise_strides": [1, 2, 2, 2, 1, 2, 1],
    "stackwise_block_types": ["v1"] * 7,
    "min_depth": None,
    "include_stem_padding": True,
    "use_depth_divisor_as_min_depth": True,
    "cap_round_filter_decrease": True,
    "stem_conv_padding": "valid",
    "batch_norm_epsilon": 1e-5,
    "dropout": 0,
}
_REPEATS = [1, 2, 2, 3, 3, 4, 1]


def build(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    """Create the model."""
    create = _of_applications if arguments["same_padding"] else _of_keras_hub
    return create(keras, arguments, classes, shape)


def _of_applications(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    module = applications_module(keras, "EfficientNetB0")
    width, depth = arguments["width"], arguments["depth"]
    blocks = copy.deepcopy(module.DEFAULT_BLOCKS_ARGS)
    if arguments["lite"]:
        # Neither the stem, the head, nor the number of first and last blocks are scaled.
        for index, block in enumerate(blocks):
            block["filters_in"] = _rounded(block["filters_in"], width if index else 1.0)
            block["filters_out"] = _rounded(block["filters_out"], width)
            block["se_ratio"] = 0.0
            if 0 < index < len(blocks) - 1:
                block["repeats"] = math.ceil(depth * block["repeats"])
        blocks[0]["filters_in"] = 32
        width = depth = 1.0
    model = module.EfficientNet(
        width,
        depth,
        shape[0],
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        activation="relu6" if arguments["lite"] else "swish",
        blocks_args=blocks,
        weights=None,
        input_shape=shape,
        classes=classes,
        classifier_activation=None,
    )
    return without_preprocessing(keras, model, "stem_conv_pad")


def _of_keras_hub(keras: Any, arguments: dict[str, Any], classes: int, shape: Shape) -> Any:
    models = keras_hub_models("EfficientNet")
    lite = arguments["lite"]
    backbone = models.EfficientNetBackbone(
        **_STAGES,
        stackwise_num_repeats=_REPEATS,
        stackwise_width_coefficients=[arguments["width"]] * 7,
        stackwise_depth_coefficients=[arguments["depth"]] * 7,
        stackwise_squeeze_and_excite_ratios=[0.0 if lite else 0.25] * 7,
        activation="relu6" if lite else "swish",
        input_shape=shape,
    )
    return models.EfficientNetImageClassifier(backbone, classes)


def _rounded(filters: int, width: float) -> int:
    """A number of channels times ``width``, as a multiple of 8."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
