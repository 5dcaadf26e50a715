"""The small models: their configs in transformers, and the timm models of the same shape."""

from dataclasses import dataclass
from typing import Any

CLASSES = 5


@dataclass(frozen=True)
class Small:
    """A small model of transformers."""

    architecture: str
    """Its class in transformers, which names its config class, too."""
    config: dict[str, Any]
    """Fields of the config."""
    size: int = 32
    """Width and height of its images."""
    classifiers: tuple[str, ...] = ("classifier",)
    """Its layers that PEFT trains in full (`modules_to_save`)."""
    timm: tuple[str, dict[str, Any]] | None = None
    """The timm model of the same shape, where timm has one."""
    convolutional: bool = False
    """Whether it is a CNN, which has no query and value."""
    fused: bool = False
    """Whether query, key and value are one layer."""
    targets: tuple[str, ...] = ()
    """Layers of small adapters where query and value are not layers."""


_VIT = dict(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
)
_TIMM_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2)
_SWIN = dict(
    image_size=64,
    patch_size=4,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    mlp_ratio=2.0,
    drop_path_rate=0.0,
)
_TIMM_SWIN = dict(
    img_size=64,
    patch_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    mlp_ratio=2,
)
_CONVNEXT = dict(image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
_TIMM_CONVNEXT = dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1))
_MIT = dict(
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 16, 24, 32],
    num_attention_heads=[1, 2, 3, 4],
    drop_path_rate=0.0,
)
_SEGFORMER = dict(
    _MIT,
    mlp_ratios=[4, 4, 4, 4],  # the only ratio of keras_hub
    classifier_dropout_prob=0.0,
    decoder_hidden_size=16,
)
_MOBILENET_V2 = dict(image_size=64, depth_multiplier=0.35, classifier_dropout_prob=0.0)

MODELS = {
    "vit": Small("ViTForImageClassification", _VIT, timm=("vit_tiny_patch16_224", _TIMM_VIT)),
    "deit": Small("DeiTForImageClassification", _VIT),
    "deit_distilled": Small(
        "DeiTForImageClassificationWithTeacher",
        _VIT,
        classifiers=("cls_classifier", "distillation_classifier"),
        timm=("deit_tiny_distilled_patch16_224", _TIMM_VIT),
    ),
    "swin": Small(
        "SwinForImageClassification",
        _SWIN,
        size=64,
        timm=("swin_tiny_patch4_window7_224", _TIMM_SWIN),
    ),
    "swinv2": Small(
        "Swinv2ForImageClassification",
        _SWIN,
        size=64,
        timm=("swinv2_tiny_window8_256", _TIMM_SWIN),
    ),
    "convnext": Small(
        "ConvNextForImageClassification",
        _CONVNEXT,
        size=64,
        timm=("convnext_tiny", _TIMM_CONVNEXT),
        convolutional=True,
        targets=("pwconv1", "pwconv2"),
    ),
    "convnextv2": Small(
        "ConvNextV2ForImageClassification",
        _CONVNEXT,
        size=64,
        timm=("convnextv2_tiny", _TIMM_CONVNEXT),
        convolutional=True,
        targets=("pwconv1", "pwconv2"),
    ),
    "resnet": Small(
        "ResNetForImageClassification",
        # timm's stem has 64 channels in every ResNet, and so has keras_hub's first stage.
        dict(embedding_size=64, hidden_sizes=[256, 64, 96, 128], depths=[2, 1, 1, 1]),
        size=64,
        timm=("resnet50", dict(layers=(2, 1, 1, 1), channels=(64, 16, 24, 32))),
        convolutional=True,
        targets=("layer.0.convolution", "layer.2.convolution"),
    ),
    "dinov2": Small(
        "Dinov2ForImageClassification",
        dict(_VIT, mlp_ratio=2),
        timm=("vit_small_patch14_dinov2", _TIMM_VIT),
    ),
    "dinov2_registers": Small(
        "Dinov2WithRegistersForImageClassification",
        dict(_VIT, mlp_ratio=2, num_register_tokens=4),
        timm=("vit_small_patch14_reg4_dinov2", _TIMM_VIT),
    ),
    # transformers has no DINOv3 with a classifier.
    "dinov3": Small(
        "DINOv3ViTModel",
        dict(_VIT, num_register_tokens=4),
        classifiers=(),
        timm=("vit_small_patch16_dinov3", _TIMM_VIT),
    ),
    "segformer": Small("SegformerForImageClassification", _SEGFORMER, size=64),
    "segformer_segmentation": Small(
        "SegformerForSemanticSegmentation",
        _SEGFORMER,
        size=64,
        classifiers=("decode_head",),
    ),
    "mobilenet_v2": Small(
        "MobileNetV2ForImageClassification",
        dict(_MOBILENET_V2, tf_padding=False),
        size=64,
        timm=("mobilenetv2_035", {}),
        convolutional=True,
        targets=("expand_1x1.convolution", "reduce_1x1.convolution"),
    ),
    # Padded as in TensorFlow, which is the default. The padding reads the stride of the
    # convolution, which PEFT's layer does not have: PEFT cannot adapt the convolutions.
    "mobilenet_v2_tf": Small(
        "MobileNetV2ForImageClassification", _MOBILENET_V2, size=64, convolutional=True
    ),
    "efficientnet": Small(
        "EfficientNetForImageClassification",
        dict(
            image_size=64,
            width_coefficient=0.25,
            depth_coefficient=1.0,
            hidden_dim=320,
            dropout_rate=0.0,
            drop_connect_rate=0.0,
        ),
        size=64,
        timm=("tf_efficientnet_b0", dict(channel_multiplier=0.25)),
        convolutional=True,
        targets=("expand_conv", "project_conv"),
    ),
    "pvt_v2": Small(
        "PvtV2ForImageClassification",
        dict(
            _MIT,
            image_size=64,
            mlp_ratios=[2, 2, 2, 2],
            sr_ratios=[8, 4, 2, 1],
        ),
        size=64,
        timm=(
            "pvt_v2_b0",
            dict(
                depths=(1, 1, 1, 1),
                embed_dims=(8, 16, 24, 32),
                num_heads=(1, 2, 3, 4),
                mlp_ratios=(2, 2, 2, 2),
            ),
        ),
    ),
    "beit": Small(
        "BeitForImageClassification",
        dict(_VIT, use_relative_position_bias=True, drop_path_rate=0.0),
        timm=("beit_base_patch16_224", _TIMM_VIT),
    ),
    "siglip": Small(
        "SiglipForImageClassification",
        dict(vision_config=_VIT),
        timm=("vit_base_patch16_siglip_224", _TIMM_VIT),
    ),
    "clip": Small(
        "CLIPForImageClassification",
        dict(vision_config=_VIT, projection_dim=16),
        timm=("vit_base_patch16_clip_224", _TIMM_VIT),
    ),
    "timm_wrapper": Small(
        "TimmWrapperForImageClassification",
        dict(
            architecture="vit_tiny_patch16_224",
            model_args=_TIMM_VIT,
        ),
        classifiers=("timm_model.head",),
        targets=("qkv",),
        fused=True,
    ),
    # A module of the user's around a timm model, which transformers does not know.
    "backbone": Small(
        "Backbone",
        dict(architecture="vit_tiny_patch16_224", model_args=_TIMM_VIT),
        targets=("qkv",),
        fused=True,
    ),
}


def make_timm(name):
    """The timm model of the same shape, with random weights."""
    import timm
    from timm.models import efficientnet

    architecture, fields = MODELS[name].timm
    if "channel_multiplier" in fields:
        return efficientnet._gen_efficientnet(architecture, num_classes=CLASSES, **fields)
    return timm.create_model(architecture, num_classes=CLASSES, **fields)
