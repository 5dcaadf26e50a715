"""``LoRAModel``: what the LoRA versions of tfimm's architectures share."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import legacy_backend
from tfimm_lora.model.inject import adapt_model

_backend = legacy_backend()


class LoRAModel(_backend.FilteredWeights):  # type: ignore[name-defined]
    """Mixin that builds the model and puts LoRA into it when it is created.

    Creating one from its config gives the same layers adapted and the same variables
    trained, so whole-model files can be loaded and trained on.
    """

    cfg: Any

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        self(self.dummy_inputs)
        adapt_model(self, cfg, rebuilt_by_class=True)

    def _is_trained(self, variable: Any) -> bool:
        """Own variables of the model (cls_token, pos_embed, ...) are frozen."""
        if "_lora_config" not in self.__dict__:
            return True
        return self.cfg.lora_train_bias == "all" and _backend.is_bias_like(variable)
