"""Pretrained weights of timm for tfimm models, without torch."""

from tfimm_lora.zoo.weights.load import load_timm_weights
from tfimm_lora.zoo.weights.preprocessing import create_preprocessing

__all__ = ["create_preprocessing", "load_timm_weights"]
