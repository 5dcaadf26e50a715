"""The LoRA layers of the Keras that this process uses; ``lora_class`` makes the others."""

from typing import Any

from tfimm_lora.layers.conversion import default_lora_layer


def __getattr__(name: str) -> Any:
    return default_lora_layer(name)
