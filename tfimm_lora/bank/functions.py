"""The compiled functions of a bank, and how a batch is divided among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Tensor, Variable
from tfimm_lora.bank.layout import Layout
from tfimm_lora.bank.source import BankSource
from tfimm_lora.layers.mixed_batch import using
from tfimm_lora.model.output_activation import output_activation

#: The number of examples with one adapter from which they are computed on their own. Together
#: they need one product with W + A B for all; apart, each needs products of its own.
OWN_BATCH = 8


def batch_plan(names: Sequence[str | None], capacity: int) -> list[tuple[list[int], bool]]:
    """Divide a batch into parts, each of which is computed at once.

    This is the only place where that is decided: ``OWN_BATCH`` examples with the same adapter,
    or all examples of the batch, are a part of their own, which costs what the model without
    adapters does. All others are mixed.

    Args:
        names: The adapter of each example.
        capacity: The number of different adapters that a part may use.

    Returns:
        The indices of the examples of each part, and whether they use one adapter.

    Example:
        >>> batch_plan(["cats"] * 8 + ["dogs", None], 64)
        [([0, 1, 2, 3, 4, 5, 6, 7], True), ([8, 9], False)]
    """
    groups: dict[str | None, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    parts, mixed = [], []
    for indices in groups.values():
        if len(indices) >= OWN_BATCH or len(groups) == 1:
            parts.append((indices, True))
        else:
            mixed.append(indices)
    for first in range(0, len(mixed), capacity):
        together = mixed[first : first + capacity]
        indices = sorted(index for group in together for index in group)
        parts.append((indices, len(together) == 1))
    return parts


def padded_batch(array: np.ndarray) -> np.ndarray:
    """Repeat the last example until the size of the batch is a power of two."""
    size = 1 << (len(array) - 1).bit_length() if len(array) else 0
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


class BankFunctions:
    """The functions of a bank, compiled when they are first used.

    There is one for batches with one adapter and one for mixed batches, each without and with
    what only some adapters have (DoRA, biases), so that the others do not pay for it.

    Args:
        model: The model with the layers of the bank.
        layout: The layout of the slots.
        table: The variable with all slots.
    """

    def __init__(self, model: Any, layout: Layout, table: Variable) -> None:
        self.model, self.layout, self.table = model, layout, table
        self._backend = backend_of(model)
        self._compiled: dict[tuple[bool, frozenset[str]], Any] = {}
        self.ends_in_softmax = output_activation(model) == "softmax"

    def __call__(
        self, inputs: np.ndarray, slots: np.ndarray, uniform: bool, optional: frozenset[str]
    ) -> np.ndarray:
        """The outputs of the model, (batch, max_classes)."""
        key = (uniform, optional)
        if key not in self._compiled:

            def function(inputs: Tensor, slots: Tensor) -> Tensor:
                return self.outputs(inputs, slots, uniform, optional)

            variables = [*self.model.variables, self.table]
            self._compiled[key] = self._backend.compiled(function, variables)
        outputs: np.ndarray = self._compiled[key](inputs, slots)
        return outputs

    def outputs(
        self, inputs: Tensor, slots: Tensor, uniform: bool, optional: frozenset[str]
    ) -> Tensor:
        """The outputs of the model as a tensor, for the slot of each example."""
        source = BankSource(self._backend, self.layout, self.table, slots, uniform, optional)
        with using(source):
            outputs = self.model(inputs, training=False)
        if isinstance(outputs, (dict, list, tuple)):
            raise ValueError(
                f"Model '{self.model.name}' returns {len(outputs)} outputs; expected a model "
                "with one output in a bank."
            )
        return outputs

    def logits(self, outputs: np.ndarray) -> np.ndarray:
        """The logits from outputs of the model."""
        if not self.ends_in_softmax:
            return outputs
        with np.errstate(divide="ignore"):
            logarithms: np.ndarray = np.log(outputs)
        return logarithms
