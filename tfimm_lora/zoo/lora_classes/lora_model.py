"""``LoRAModel``: the base of the LoRA versions of tfimm's architectures."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import legacy_backend
from tfimm_lora.layers.state import Converted
from tfimm_lora.model.inject import adapt_model
from tfimm_lora.model.state import config_of

_backend = legacy_backend()


class LoRAModel(_backend.FilteredWeights, Converted):  # type: ignore[name-defined]
    """Mixin that builds the model and injects LoRA when it is created.

    A model that is created from its config has the same adapted layers and the same trained
    variables, so whole-model files can be loaded and trained further.
    """

    cfg: Any

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        self(self.dummy_inputs)
        adapt_model(self, cfg, rebuilt_by_class=True)

    def _is_trained(self, variable: Any) -> bool:
        """Whether an own variable of the model (cls_token, pos_embed, ...) is not frozen."""
        if config_of(self) is None:
            return True
        return self.cfg.lora_train_bias == "all" and bool(_backend.is_bias_like(variable))
