"""ViT, DeiT and hybrids of ResNet and ViT: the projections of attention and the MLP.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; Touvron et
al., "Training data-efficient image transformers", arXiv:2012.12877.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar

import tensorflow as tf
from tfimm.architectures.vit import ViT, ViTConfig, ViTMultiHeadAttention
from tfimm.models import keras_serializable

from tfimm_lora.config import LoRAConfig, Presets
from tfimm_lora.families.vit import PRESETS
from tfimm_lora.layers.frozen import register_cheaper_call
from tfimm_lora.model.registry import register_lora_architecture
from tfimm_lora.zoo.lora_classes.lora_model import LoRAModel


@dataclass
class LoRAViTConfig(LoRAConfig, ViTConfig):
    """``ViTConfig`` with the fields of ``LoRAConfig``."""

    lora_presets: ClassVar[Presets] = PRESETS


@keras_serializable
@register_lora_architecture
class LoRAViT(LoRAModel, ViT):
    """ViT, DeiT with LoRA; see ``LoRAViTConfig``."""

    cfg_class = LoRAViTConfig


@register_cheaper_call(ViTMultiHeadAttention)
def attention(layer: Any, x: Any, training: bool = False, return_features: bool = False) -> Any:
    """Compute softmax(q k^T / sqrt(d)) v as tfimm does, but unstack q, k and v together.

    If q, k and v are sliced one by one, each gradient is as large as all three and mostly
    zero, and the three are summed: a fifth of a training step of ViT-Ti. Unstacked together,
    they have one stacked gradient. The scale is applied to q, which is smaller than q k^T.
    """
    batch, length = tf.unstack(tf.shape(x)[:2])
    qkv = tf.reshape(layer.qkv(x), (batch, length, 3, layer.nb_heads, -1))
    query, key, value = tf.unstack(tf.transpose(qkv, (2, 0, 3, 1, 4)))
    scores = tf.linalg.matmul(layer.scale * query, key, transpose_b=True)
    weights = tf.nn.softmax(scores)
    weights = layer.attn_drop(weights, training=training)
    heads = tf.transpose(tf.linalg.matmul(weights, value), (0, 2, 1, 3))
    y = layer.proj(tf.reshape(heads, (batch, length, -1)))
    y = layer.proj_drop(y, training=training)
    return (y, OrderedDict(attn=weights)) if return_features else y
