"""Small models of keras_hub by family, on Keras 3."""

from __future__ import annotations

from typing import Any

import keras_hub
from keras_hub.src.models.clip.clip_vision_encoder import CLIPVisionEncoder
from keras_hub.src.models.siglip.siglip_vision_encoder import SigLIPVisionEncoder

SIZE = 32
CLASSES = 5


def _vit() -> Any:
    backbone = keras_hub.models.ViTBackbone((SIZE, SIZE, 3), (8, 8), 2, 4, 32, 64)
    return keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=CLASSES)


def _deit() -> Any:
    backbone = keras_hub.models.DeiTBackbone((SIZE, SIZE, 3), (8, 8), 2, 4, 32, 64)
    return keras_hub.models.DeiTImageClassifier(backbone=backbone, num_classes=CLASSES)


def _deit_distilled() -> Any:
    backbone = keras_hub.models.DeiTBackbone(
        (SIZE, SIZE, 3), (8, 8), 2, 4, 32, 64, use_distillation_token=True
    )
    return keras_hub.models.DeiTImageClassifier(backbone=backbone, num_classes=CLASSES)


def _swin() -> Any:
    backbone = keras_hub.models.SwinTransformerBackbone(
        (64, 64, 3), 16, (2, 2), (2, 4), 4, mlp_ratio=2.0, drop_path=0.0
    )
    return keras_hub.models.SwinTransformerImageClassifier(
        backbone=backbone, num_classes=CLASSES
    )


def _dinov2(registers: int = 0) -> Any:
    return keras_hub.models.DINOV2Backbone(
        8, 2, 32, 4, 64, num_register_tokens=registers, image_shape=(SIZE, SIZE, 3)
    )


def _dinov3() -> Any:
    return keras_hub.models.DINOV3Backbone(
        8, 2, 32, 4, 64, num_register_tokens=4, image_shape=(SIZE, SIZE, 3)
    )


def _mit_backbone() -> Any:
    return keras_hub.models.MiTBackbone(
        [1, 1, 1, 1],
        4,
        [1, 2, 3, 4],
        [8, 4, 2, 1],
        0.0,
        [7, 3, 3, 3],
        [4, 2, 2, 2],
        image_shape=(64, 64, 3),
        hidden_dims=[8, 16, 24, 32],
    )


def _mit() -> Any:
    return keras_hub.models.MiTImageClassifier(backbone=_mit_backbone(), num_classes=CLASSES)


def _segformer() -> Any:
    backbone = keras_hub.models.SegFormerBackbone(
        image_encoder=_mit_backbone(), projection_filters=16
    )
    return keras_hub.models.SegFormerImageSegmenter(backbone=backbone, num_classes=CLASSES)


def _siglip() -> Any:
    return SigLIPVisionEncoder(8, 32, 2, 4, 64, image_shape=(SIZE, SIZE, 3))


def _clip() -> Any:
    return CLIPVisionEncoder(8, 32, 2, 4, 64, image_shape=(SIZE, SIZE, 3))


MODELS = {
    "vit": _vit,
    "deit": _deit,
    "deit_distilled": _deit_distilled,
    "swin": _swin,
    "dinov2": _dinov2,
    "dinov2_registers": lambda: _dinov2(4),
    "dinov3": _dinov3,
    "mit": _mit,
    "segformer": _segformer,
    "siglip": _siglip,
    "clip": _clip,
}
