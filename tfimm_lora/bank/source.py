"""Read the values of the examples of a batch from the table of a bank."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tfimm_lora.backend.interface import Backend, Layer, Tensor, Variable
from tfimm_lora.bank.layout import Layout, Part
from tfimm_lora.layers.mixed_batch import RowValues

#: What only some adapters have, and costs time for a whole batch: the parts of a layer.
OPTIONAL = ("gain", "shift")


class BankSource:
    """The source of a running model: for each example the values in its slot.

    Args:
        backend: The backend of the model.
        layout: The layout of the slots.
        table: The variable with all slots.
        slots: An integer tensor: the slot of each example, or (1,) if all use the same.
        uniform: Whether all examples use one slot.
        optional: Which of ``OPTIONAL`` the adapters of the batch have.
    """

    def __init__(
        self,
        backend: Backend,
        layout: Layout,
        table: Variable,
        slots: Tensor,
        uniform: bool,
        optional: Collection[str],
    ) -> None:
        self.uniform = uniform
        self.foldable: dict[int, Any] = {}
        self._backend, self._layout, self._table = backend, layout, table
        self._first_pages = backend.ops.cast(slots, "int32") * layout.pages
        self._paths = {id(layer): path for path, layer in layout.layers.items()}
        self._left_out = [name for name in OPTIONAL if name not in optional]
        self._found: dict[str, RowValues] = {}

    def values(self, layer: Layer) -> RowValues | None:
        """The values for a layer, or None if no adapter of the bank can change it."""
        path = self._paths.get(id(layer))
        if path is None:
            return None
        if path not in self._found:
            is_head = path in self._layout.heads
            parts = {
                name: self._layout.parts.get((path, name))
                for name in RowValues._fields
                if is_head or name not in self._left_out
            }
            read = {name: self._read(part) for name, part in parts.items() if part}
            self._found[path] = RowValues(**read)
        return self._found[path]

    def unread(self) -> list[str]:
        """The paths of the layers that have not asked for their values."""
        return [path for path in self._layout.layers if path not in self._found]

    def _read(self, part: Part) -> Any:
        """A part of the slots of all examples: (examples, *shape)."""
        ops = self._backend.ops
        rows = self._first_pages[:, None] + ops.arange(part.first, part.first + part.pages)
        pages = self._backend.read_rows(self._table, rows)
        size = math.prod(part.shape)
        if self.uniform:
            return ops.reshape(ops.reshape(pages, (-1,))[:size], part.shape)
        flat = ops.reshape(pages, (-1, part.pages * pages.shape[-1]))
        flat = flat if size == flat.shape[-1] else flat[:, :size]
        return ops.reshape(flat, (-1, *part.shape))
