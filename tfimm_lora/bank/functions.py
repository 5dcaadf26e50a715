"""The compiled functions of a bank, and how a batch is divided among them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Tensor, Variable
from tfimm_lora.bank.examples_apart import made_up_inputs, require_examples_apart
from tfimm_lora.bank.layout import Layout
from tfimm_lora.bank.source import OPTIONAL, BankSource
from tfimm_lora.layers.mixed_batch import using
from tfimm_lora.layers.mixed_product import sizes

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
        probe: The slot of an adapter that changes every layer.
        lock: The lock of the bank.
        require_open: Raises if the bank is closed.
        require_called: Raises if an adapter changes a layer that is ``not_called``.

    Attributes:
        not_called: The paths of the layers of the bank that the model does not call.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        table: Variable,
        probe: int,
        lock: threading.RLock,
        require_open: Callable[[], None],
        require_called: Callable[[], None],
    ) -> None:
        self.model, self.layout, self.table = model, layout, table
        self._backend = backend_of(model)
        self.not_called: frozenset[str] = frozenset()
        self._probe, self._lock = probe, lock
        self._require_open, self._require_called = require_open, require_called
        self._compiled: dict[tuple[bool, frozenset[str]], Any] = {}
        #: Functions of mixed batches by their parts, and inputs for which they were checked.
        self._checked: set[tuple[frozenset[str], tuple[int, ...], str]] = set()

    def __call__(
        self, inputs: np.ndarray, slots: np.ndarray, uniform: bool, optional: frozenset[str]
    ) -> np.ndarray:
        """The outputs of the model, (batch, ...), for arrays of inputs and slots."""
        if not uniform:
            self._check(inputs.shape[1:], inputs.dtype.name, optional)
        return self._run(inputs, slots, uniform, optional)

    def _run(
        self, inputs: np.ndarray, slots: np.ndarray, uniform: bool, optional: frozenset[str]
    ) -> np.ndarray:
        key = (uniform, optional)
        if key not in self._compiled:

            def function(inputs: Tensor, slots: Tensor) -> Tensor:
                return self.outputs(inputs, slots, uniform, optional)

            variables = [*self.model.variables, self.table]
            self._compiled[key] = self._backend.compiled(function, variables)
        count = len(inputs)
        if self._backend.compiles_each_batch_size():
            inputs = padded_batch(inputs)
            slots = slots if uniform else padded_batch(slots)
        outputs: np.ndarray = self._compiled[key](inputs, slots)
        return outputs[:count]

    def _check(self, shape: tuple[int, ...], dtype: str, optional: frozenset[str]) -> None:
        """Raise unless mixed batches of such inputs are computed right; see
        ``examples_apart``."""
        if (optional, shape, dtype) in self._checked:
            return

        def mixed(inputs: np.ndarray, slots: np.ndarray) -> np.ndarray:
            return self._run(inputs, slots, False, optional)

        require_examples_apart(self.model.name, mixed, shape, dtype, self._probe)
        self._checked.add((optional, shape, dtype))

    def of_made_up_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """The outputs of the model without adapter, for made up inputs like these."""
        made_up = made_up_inputs(inputs.shape[1:], inputs.dtype.name)
        return self._run(made_up, np.zeros(1, "int32"), True, frozenset())

    def require_checked(self, inputs: Tensor) -> None:
        """Raise unless mixed batches of such inputs are computed right.

        Args:
            inputs: A tensor, which may be one of a function that is traced.
        """
        if isinstance(inputs, (dict, list, tuple)):
            raise ValueError(
                f"Received {len(inputs)} inputs of model '{self.model.name}'; expected a model "
                "with one input in a bank."
            )
        shape, dtype = tuple(inputs.shape[1:]), self._backend.dtype_of(inputs)
        if any(d == dtype and _may_be(s, shape) for _, s, d in self._checked):
            return
        if None in shape:
            raise ValueError(
                f"Received inputs of shape {tuple(inputs.shape)} for the model of a bank, some "
                "sizes of which are not known; expected known ones. Call bank.warm_up on some "
                "inputs first."
            )
        # In another thread nothing is being traced.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._check_alone, shape, dtype).result()

    def _check_alone(self, shape: tuple[int, ...], dtype: str) -> None:
        with self._lock:
            self._check(shape, dtype, frozenset(OPTIONAL))

    def outputs(
        self, inputs: Tensor, slots: Tensor, uniform: bool, optional: frozenset[str]
    ) -> Tensor:
        """The outputs of the model as a tensor, for the slot of each example."""
        self._require_open()
        outputs, unread = bank_outputs(
            self.model, self.layout, self.table, inputs, slots, uniform, optional
        )
        self.not_called = frozenset(unread)
        self._require_called()
        return outputs


def bank_outputs(
    model: Any,
    layout: Layout,
    table: Variable,
    inputs: Tensor,
    slots: Tensor,
    uniform: bool,
    optional: frozenset[str],
) -> tuple[Tensor, list[str]]:
    """The outputs of a model as a tensor, for the slot of each example, and the paths of the
    layers of the bank that the model did not call.

    Args:
        model: The model with the layers of a bank.
        layout: The layout of the slots.
        table: The variable with all slots.
        inputs: The inputs of the model.
        slots: The slot of each example; if uniform, (1,).
        uniform: Whether all examples use one slot.
        optional: Which of ``source.OPTIONAL`` the adapters of the slots may have.
    """
    backend = backend_of(model)
    if not uniform:  # an error where the numbers of examples and slots differ
        slots = backend.ops.reshape(slots, (sizes(backend, inputs)[0],))
    source = BankSource(backend, layout, table, slots, uniform, optional)
    with using(source):
        outputs = model(inputs, training=False)
    if isinstance(outputs, (dict, list, tuple)):
        raise ValueError(
            f"Model '{model.name}' returns {len(outputs)} outputs; expected a model with one "
            "output in a bank."
        )
    return outputs, source.unread()


def _may_be(shape: tuple[int, ...], other: tuple[int | None, ...]) -> bool:
    """Whether inputs of a shape have another one, in which None is unknown."""
    same = len(shape) == len(other)
    return same and all(size in (known, None) for known, size in zip(shape, other))
