"""The vision models of keras_hub 0.32, each from the smallest config that runs.

The towers of its language models are among them. keras_hub is imported when a model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.helpers.kerases import BACKEND, keras, normal

SIZE = 32
IMAGE = (SIZE, SIZE, 3)
CLASSES = 3


def hub() -> Any:
    import keras_hub

    return keras_hub.models


def images(size: int = SIZE, count: int = 2) -> np.ndarray:
    return normal(count, size, size, 3)


@dataclass(frozen=True)
class HubModel:
    """One model of keras_hub.

    Attributes:
        cls: The name of its class in ``keras_hub.models``.
        make: Creates it, with random weights.
        inputs: Creates its inputs.
        labels: Creates the labels for the model's own loss. None: mean squared error.
        kind: Distinguishes models of the same class.
        backends: The backends that run it, if not all do.
        features: The number of features that ``with_classifier`` classifies, for backbones.
    """

    cls: str
    make: Callable[[], Any]
    inputs: Callable[[], Any] = images
    labels: Callable[[], Any] | None = None
    kind: str = ""
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")
    features: int | None = None

    @property
    def name(self) -> str:
        return f"{self.cls}-{self.kind}" if self.kind else self.cls

    @property
    def is_here(self) -> bool:
        return BACKEND in self.backends


# -- backbones ----------------------------------------------------------------------------


def cspnet():
    return hub().CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=2,
        stackwise_depth=[1, 1],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[8, 16],
        block_type="dark_block",
        stage_type="csp",
        bottle_ratio=[0.5],
        block_ratio=[1.0],
        expand_ratio=[2.0],
        image_shape=IMAGE,
    )


def deit():
    return hub().DeiTBackbone(
        image_shape=IMAGE,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    )


def densenet():
    return hub().DenseNetBackbone(
        stackwise_num_repeats=[1, 1], growth_rate=4, image_shape=IMAGE
    )


def efficientnet():
    return hub().EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["v1", "v1"],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        input_shape=IMAGE,
    )


def efficientnet_v2():
    return hub().EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        stackwise_force_input_filters=[0, 0],
        stackwise_nores_option=[False, False],
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        input_shape=IMAGE,
    )


def hgnetv2(image_shape=IMAGE):
    return hub().HGNetV2Backbone(
        depths=[1, 1],
        embedding_size=8,
        hidden_sizes=[16, 32],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, True],
        image_shape=image_shape,
        out_features=["stage1", "stage2"],
    )


def mit():
    return hub().MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.0,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=IMAGE,
        hidden_dims=[8, 16],
    )


def mobilenet():
    return hub().MobileNetBackbone(
        stackwise_expansion=[[8], [16]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [16]],
        stackwise_kernel_size=[[3], [5]],
        stackwise_num_strides=[[2], [2]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [2]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=True,
        last_layer_filter=16,
        squeeze_and_excite=0.5,
        image_shape=IMAGE,
        input_num_filters=8,
    )


def mobilenetv5(image_shape=IMAGE, **kwargs):
    """With an attention block of MobileNetV4 among its blocks."""
    return hub().MobileNetV5Backbone(
        stackwise_block_types=[["er"], ["uir", "mqa"]],
        stackwise_num_blocks=[1, 2],
        stackwise_num_filters=[[8], [16, 16]],
        stackwise_strides=[[2], [2, 1]],
        stackwise_act_layers=[["relu"], ["relu", "relu"]],
        stackwise_exp_ratios=[[2.0], [2.0, 0.0]],
        stackwise_se_ratios=[[0.0], [0.0, 0.0]],
        stackwise_dw_kernel_sizes=[[0], [5, 3]],
        stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
        stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
        stackwise_exp_kernel_sizes=[[3], [0, 0]],
        stackwise_pw_kernel_sizes=[[1], [0, 0]],
        stackwise_num_heads=[[0], [0, 2]],
        stackwise_key_dims=[[0], [0, 8]],
        stackwise_value_dims=[[0], [0, 8]],
        stackwise_kv_strides=[[0], [0, 1]],
        stackwise_use_cpe=[[False], [False, False]],
        image_shape=image_shape,
        stem_size=8,
        num_features=16,
        **{"use_msfa": False, **kwargs},
    )


def resnet(image_shape=IMAGE, block_type="basic_block", use_pre_activation=False):
    return hub().ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 8, 8],
        stackwise_num_blocks=[1, 1, 1],
        stackwise_num_strides=[1, 2, 2],
        block_type=block_type,
        use_pre_activation=use_pre_activation,
        image_shape=image_shape,
    )


def swin():
    return hub().SwinTransformerBackbone(
        image_shape=IMAGE, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=4
    )


def vgg():
    return hub().VGGBackbone(
        stackwise_num_repeats=[1, 1], stackwise_num_filters=[8, 16], image_shape=IMAGE
    )


def vit(**kwargs):
    return hub().ViTBackbone(
        **{
            "image_shape": IMAGE,
            "patch_size": (16, 16),
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 8,
            "mlp_dim": 16,
            **kwargs,
        }
    )


def vit_det():
    return hub().ViTDetBackbone(
        hidden_size=8,
        num_layers=2,
        intermediate_dim=16,
        num_heads=2,
        global_attention_layer_indices=[1],
        patch_size=8,
        num_output_channels=8,
        window_size=2,
        image_shape=IMAGE,
    )


def xception():
    return hub().XceptionBackbone(
        stackwise_conv_filters=[[8, 8], [16, 16]],
        stackwise_pooling=[True, False],
        image_shape=IMAGE,
    )


def dinov2(**kwargs):
    return hub().DINOV2Backbone(
        **{
            "patch_size": 8,
            "num_layers": 2,
            "hidden_dim": 8,
            "num_heads": 2,
            "intermediate_dim": 16,
            "image_shape": IMAGE,
            "position_embedding_shape": (16, 16),
            **kwargs,
        }
    )


def dinov3(**kwargs):
    return hub().DINOV3Backbone(
        **{
            "patch_size": 8,
            "num_layers": 2,
            "hidden_dim": 16,
            "num_heads": 2,
            "intermediate_dim": 16,
            "image_shape": IMAGE,
            **kwargs,
        }
    )


TOWER = dict(num_layers=2, hidden_dim=8, num_heads=2, intermediate_dim=16)
TEXT = dict(**TOWER, vocabulary_size=16, embedding_dim=8, max_sequence_length=6)


def clip_tower(**kwargs):
    return hub().CLIPVisionEncoder(patch_size=16, image_shape=IMAGE, **TOWER, **kwargs)


def metaclip2_tower(**kwargs):
    return hub().MetaCLIP2VisionEncoder(patch_size=16, image_shape=IMAGE, **TOWER, **kwargs)


def siglip_tower(**kwargs):
    return hub().SigLIPVisionEncoder(patch_size=16, image_shape=IMAGE, **TOWER, **kwargs)


def clip():
    text = hub().CLIPTextEncoder(**TEXT, name="text")
    return hub().CLIPBackbone(clip_tower(name="vision"), text, projection_dim=8)


def metaclip2():
    text = hub().MetaCLIP2TextEncoder(**TEXT, name="text")
    return hub().MetaCLIP2Backbone(metaclip2_tower(name="vision"), text, projection_dim=8)


def siglip():
    text = hub().SigLIPTextEncoder(**TEXT, name="text")
    return hub().SigLIPBackbone(siglip_tower(name="vision"), text)


def blip2_tower():
    return hub().BLIP2VisionEncoder(
        image_size=SIZE,
        patch_size=16,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
        **TOWER,
    )


def gemma3_tower():
    return hub().Gemma3VisionEncoder(
        image_size=SIZE, patch_size=8, pool_size=2, output_dim=8, **TOWER
    )


def gemma4_tower():
    # With clipped linear layers, which checkpoints switch on, each Dense is inside another.
    return hub().Gemma4VisionEncoder(
        image_size=SIZE, patch_size=8, pool_size=2, output_dim=8, head_dim=4, **TOWER
    )


def video_prism():
    return hub().VideoPrismBackbone(
        num_frames=2,
        patch_size=16,
        hidden_dim=8,
        intermediate_dim=16,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=0,
        image_shape=IMAGE,
    )


def parseq():
    return hub().PARSeqBackbone(
        image_encoder=vit(use_class_token=False, name="image_encoder"),
        vocabulary_size=8,
        max_label_length=6,
        num_decoder_heads=2,
        num_decoder_layers=1,
        decoder_hidden_dim=8,
        decoder_mlp_dim=16,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )


# -- models for dense prediction ----------------------------------------------------------


def deeplab():
    return hub().DeepLabV3Backbone(
        image_encoder=resnet(),
        spatial_pyramid_pooling_key="P4",
        low_level_feature_key="P2",
        upsampling_size=4,
        dilation_rates=[2],
        projection_filters=8,
        image_shape=IMAGE,
    )


def segformer():
    return hub().SegFormerBackbone(image_encoder=mit(), projection_filters=8)


def basnet():
    # BASNet sets the shape of its encoder's pictures.
    encoder = hub().ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 8, 8, 8],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
    )
    return hub().BASNetBackbone(image_encoder=encoder, num_classes=1, image_shape=(64, 64, 3))


def retinanet():
    return hub().RetinaNetBackbone(
        image_encoder=resnet(), min_level=3, max_level=4, use_p5=False, image_shape=IMAGE
    )


def d_fine():
    return hub().DFineBackbone(
        backbone=hgnetv2((None, None, 3)),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=10,
        num_labels=CLASSES,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=10,
        anchor_image_size=(SIZE, SIZE),
        feat_strides=[4, 8],
        num_feature_levels=2,
        encoder_in_channels=[16, 32],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=1,
        out_features=["stage1", "stage2"],
        image_shape=(None, None, 3),
        seed=0,
    )


def depth_anything():
    return hub().DepthAnythingBackbone(
        image_encoder=dinov2(num_layers=4),
        reassemble_factors=[4, 2, 1, 1],
        neck_hidden_dims=[4, 4, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=4,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )


def sam():
    import keras_hub

    return hub().SAMBackbone(
        image_encoder=vit_det(),
        prompt_encoder=keras_hub.layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(SIZE, SIZE),
            mask_in_channels=4,
        ),
        mask_decoder=keras_hub.layers.SAMMaskDecoder(
            num_layers=1,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )


def sam3():
    import keras_hub

    layers = keras_hub.layers
    sizes = dict(hidden_dim=8, intermediate_dim=16, num_heads=2)
    return hub().SAM3PromptableConceptBackbone(
        vision_encoder=layers.SAM3VisionEncoder(
            image_shape=(28, 28, 3),
            patch_size=14,
            num_layers=2,
            fpn_hidden_dim=8,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(42, 42, 3),
            window_size=2,
            global_attn_indexes=[1, 2],
            **sizes,
        ),
        text_encoder=layers.SAM3TextEncoder(
            vocabulary_size=16, embedding_dim=8, num_layers=1, **sizes
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(num_layers=1, roi_size=3, **sizes),
        detr_encoder=layers.SAM3DetrEncoder(num_layers=1, **sizes),
        detr_decoder=layers.SAM3DetrDecoder(
            image_shape=(28, 28, 3), patch_size=14, num_layers=1, num_queries=4, **sizes
        ),
        mask_decoder=layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=8, num_heads=2),
    )


# -- inputs and labels --------------------------------------------------------------------


def named(key: str) -> Callable[[], Any]:
    """Inputs of a model that takes a dict of pictures."""
    return lambda: {key: images()}


def with_text() -> dict[str, Any]:
    tokens = np.array([[1, 2, 3, 4, 5, 0], [3, 1, 5, 2, 0, 0]], "int32")
    return {"images": images(), "token_ids": tokens}


def written_words() -> dict[str, Any]:
    mask = np.ones((2, 6), "int32")
    return {**with_text(), "padding_mask": mask}


def patches() -> dict[str, Any]:
    """Pictures cut into patches, and the positions of these, as Gemma 4 takes them."""
    rows, columns = np.divmod(np.arange(16), 4)
    positions = np.tile(np.stack([columns, rows], -1), (2, 1, 1, 1)).astype("int32")
    return {
        "pixel_values": normal(2, 1, 16, 3 * 8 * 8),
        "pixel_position_ids": positions,
    }


def prompts() -> dict[str, Any]:
    return {
        "images": images(),
        "points": normal(2, 1, 2) * 4 + 16,
        "labels": np.ones((2, 1), "float32"),
        "boxes": np.tile(np.array([[[[2.0, 2.0], [20.0, 20.0]]]], "float32"), (2, 1, 1, 1)),
        "masks": normal(2, 1, 16, 16, 1),
    }


def concepts() -> dict[str, Any]:
    box = np.array([[[0.5, 0.5, 0.4, 0.4, 0.0]]], "float32")
    return {
        "pixel_values": images(28),
        "token_ids": np.tile(np.arange(8, dtype="int32"), (2, 1)),
        "padding_mask": np.ones((2, 8), "bool"),
        "boxes": np.tile(box, (2, 1, 1)),
        "box_labels": np.ones((2, 1), "int32"),
    }


def boxes() -> dict[str, Any]:
    # As large as the smallest anchors: with none that matches, the loss is zero.
    box = np.array([[[0.0, 0.0, 32.0, 32.0]]], "float32")
    return {"boxes": np.tile(box, (2, 1, 1)), "labels": np.array([[0], [2]])}


def one_box() -> dict[str, Any]:
    return {
        "boxes": np.array([[[0.5, 0.5, 0.2, 0.2]]], "float32"),
        "labels": np.array([[1]]),
    }


def classes() -> np.ndarray:
    return np.array([0, 2])


# -- the models ---------------------------------------------------------------------------


def classifier(cls: str, backbone: Callable[[], Any], **more: Any) -> HubModel:
    arguments = more.pop("arguments", {})

    def make():
        return getattr(hub(), cls)(backbone=backbone(), num_classes=CLASSES, **arguments)

    return HubModel(cls, make, labels=classes, **more)


def task(cls: str, backbone: Callable[[], Any], arguments=None, **more: Any) -> HubModel:
    return HubModel(
        cls, lambda: getattr(hub(), cls)(backbone=backbone(), **(arguments or {})), **more
    )


BACKBONES = [
    HubModel("CSPNetBackbone", cspnet, features=16),
    HubModel("DeiTBackbone", deit, features=8),
    HubModel("DenseNetBackbone", densenet, features=38),
    HubModel("EfficientNetBackbone", efficientnet, features=1280),
    HubModel("EfficientNetBackbone", efficientnet_v2, kind="v2", features=1280),
    HubModel("HGNetV2Backbone", hgnetv2, features=32),
    HubModel("MiTBackbone", mit, features=16),
    HubModel("MobileNetBackbone", mobilenet, features=16),
    HubModel("MobileNetV5Backbone", mobilenetv5, features=16),
    HubModel("ResNetBackbone", resnet, features=8),
    HubModel("SwinTransformerBackbone", swin, features=16),
    HubModel("VGGBackbone", vgg, features=16),
    HubModel("ViTBackbone", vit, features=8),
    HubModel("ViTDetBackbone", vit_det, features=8),
    HubModel("XceptionBackbone", xception, features=16),
    HubModel("DINOV2Backbone", dinov2, named("images"), features=16),
    HubModel("DINOV3Backbone", dinov3, named("pixel_values"), features=32),
    HubModel("CLIPVisionEncoder", clip_tower, named("images"), features=8),
    HubModel("MetaCLIP2VisionEncoder", metaclip2_tower, named("images"), features=8),
    HubModel("SigLIPVisionEncoder", siglip_tower, named("images"), features=8),
    HubModel("BLIP2VisionEncoder", blip2_tower, features=8),
    HubModel("Gemma3VisionEncoder", gemma3_tower, lambda: images()[:, None]),
    HubModel("Gemma4VisionEncoder", gemma4_tower, patches),
    HubModel("VideoPrismBackbone", video_prism, lambda: normal(2, 2, SIZE, SIZE, 3)),
    HubModel("CLIPBackbone", clip, with_text),
    HubModel("MetaCLIP2Backbone", metaclip2, with_text),
    HubModel("SigLIPBackbone", siglip, with_text, labels=lambda: np.zeros(2, "float32")),
    HubModel("PARSeqBackbone", parseq, written_words),
    HubModel("DeepLabV3Backbone", deeplab),
    HubModel("SegFormerBackbone", segformer),
    HubModel("BASNetBackbone", basnet, lambda: images(64)),
    HubModel("RetinaNetBackbone", retinanet),
    HubModel("DFineBackbone", d_fine),
    HubModel("DepthAnythingBackbone", depth_anything, named("images")),
    HubModel("SAMBackbone", sam, prompts),
    HubModel("SAM3PromptableConceptBackbone", sam3, concepts),
]

TASKS = [
    classifier("CSPNetImageClassifier", cspnet),
    classifier("DeiTImageClassifier", deit),
    classifier("DenseNetImageClassifier", densenet),
    classifier("EfficientNetImageClassifier", efficientnet),
    classifier("HGNetV2ImageClassifier", hgnetv2, arguments={"preprocessor": None}),
    classifier("MiTImageClassifier", mit),
    classifier("MobileNetImageClassifier", mobilenet, arguments={"num_features": 8}),
    classifier("MobileNetV5ImageClassifier", mobilenetv5, arguments={"head_hidden_size": 8}),
    classifier("ResNetImageClassifier", resnet),
    classifier("SwinTransformerImageClassifier", swin),
    classifier("VGGImageClassifier", vgg, arguments={"pooling_hidden_dim": 8}),
    classifier("ViTImageClassifier", vit),
    classifier("XceptionImageClassifier", xception),
    task("DeepLabV3ImageSegmenter", deeplab, {"num_classes": CLASSES}),
    task("SegFormerImageSegmenter", segformer, {"num_classes": CLASSES}),
    task("BASNetImageSegmenter", basnet, inputs=lambda: images(64)),
    task("SAMImageSegmenter", sam, inputs=prompts),
    task("SAM3PromptableConceptImageSegmenter", sam3, inputs=concepts),
    task("RetinaNetObjectDetector", retinanet, {"num_classes": CLASSES}, labels=boxes),
    task(
        "DFineObjectDetector",
        d_fine,
        {"num_classes": CLASSES},
        inputs=lambda: images(count=1),
        labels=one_box,
    ),
    task(
        "DepthAnythingDepthEstimator",
        depth_anything,
        {"depth_estimation_type": "relative"},
        inputs=named("images"),
    ),
]

MODELS = BACKBONES + TASKS
IDS = [model.name for model in MODELS]


def squared_error(outputs: Any) -> Any:
    """A loss for each output, in the structure of the outputs."""
    return keras.tree.map_structure(lambda _: "mse", outputs)
