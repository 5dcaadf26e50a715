"""The LoRA of a model before it is replaced, to restore it if the new one does not fit."""

from __future__ import annotations

from typing import Any

from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.adapters.save import adapter_of
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import config_of, model_state


class FormerLoRA:
    """The settings and values of a model's LoRA, unmerged, and whether it is merged.

    Attributes:
        arguments: The arguments with which LoRA is injected again.
        replaced: The weights that an adapter replaced, by their key in adapters.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        config = config_of(model)
        self.arguments = (
            config.arguments() if config else lora_arguments(model, adapter_of(model))
        )
        self.replaced = dict(model_state(model).replaced)
        self._layers = {
            path: (dict(layer.lora_values()), layer.merged, layer._lora_state.strength)
            for path, layer in lora_layers(model).items()
        }

    def restore(self) -> None:
        """Assign the values after LoRA was injected again; exactly, since they are copies."""
        for path, layer in lora_layers(self._model).items():
            values, merged, strength = self._layers[path]
            layer.assign_update({name: values[name] for name in layer._lora_variables()})
            layer._lora_state.strength = strength
            if merged:
                layer.merge_weights()
        model_state(self._model).replaced = self.replaced
