"""The model of a bank as a Keras model with the adapters as an input."""

from __future__ import annotations

import functools
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.bank.functions import BankFunctions
from tfimm_lora.bank.source import OPTIONAL


def model_with_slots(functions: BankFunctions) -> Any:
    """A Keras model of the inputs {"inputs": ..., "adapter": slots}."""
    return _routed_class(backend_of(functions.model).keras.Model)(functions)


@functools.cache
def _routed_class(base: type) -> type:
    class BankModel(base):  # type: ignore[misc]
        """A model whose inputs include the slot of the adapter of each example."""

        def __init__(self, functions: BankFunctions) -> None:
            super().__init__(name=f"bank_of_{functions.model.name}")
            self.model = functions.model
            self.table = functions.table
            self._functions = functions

        def call(self, inputs: Any, training: Any = None) -> Any:
            if training:
                raise ValueError(
                    "Received training=True for the model of a bank; expected inference only. "
                    "Train an adapter with load_adapter in a model of its own."
                )
            self._functions.require_checked(inputs["inputs"])
            return self._functions.outputs(
                inputs["inputs"], inputs["adapter"], uniform=False, optional=frozenset(OPTIONAL)
            )

        def get_config(self) -> Any:
            raise ValueError(
                "The model of a bank cannot be saved as a Keras model. Save the model without "
                "the bank, and the adapters."
            )

    return BankModel
