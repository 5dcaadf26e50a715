"""The LoRA layers of the Keras that this process uses; see ``lookup`` for the others."""

from tfimm_lora.backend import default_backend
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import (
    convert_to_lora_layer,
    lora_class,
    register_layer_classes,
)
from tfimm_lora.layers.frozen import register_frozen_classes

_layers = default_backend().keras.layers
register_frozen_classes(default_backend())

LoRADense = lora_class(_layers.Dense)
LoRAConv1D = lora_class(_layers.Conv1D)
LoRAConv2D = lora_class(_layers.Conv2D)
LoRAConv3D = lora_class(_layers.Conv3D)
LoRADepthwiseConv2D = lora_class(_layers.DepthwiseConv2D)
LoRAEinsumDense = lora_class(_layers.EinsumDense)
LoRAEmbedding = lora_class(_layers.Embedding)

__all__ = [
    "LoRAConv1D",
    "LoRAConv2D",
    "LoRAConv3D",
    "LoRADense",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRALayer",
    "convert_to_lora_layer",
    "lora_class",
    "register_layer_classes",
]
