"""Where the values of an adapter are in its slot of a bank.

A slot is a number of pages of ``PAGE`` numbers. Each part of each layer (A, B, the factors of
DoRA, biases, the kernel of a classifier) begins on a page of its own, padded to the largest
rank and number of classes. All slots are one table, whose rows are the pages, so that one
operation writes a slot, and one gathers a part of many slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tfimm_lora.backend.interface import Layer
from tfimm_lora.bank.layers import BankLayers
from tfimm_lora.layers.base import LoRALayer

#: The numbers of a page.
PAGE = 64

#: A part of a layer: its path, and "a", "b", "gain", "shift" or "kernel".
PartKey = tuple[str, str]


class Part(NamedTuple):
    """A part of a layer: its first page, the number of pages, and its shape."""

    first: int
    pages: int
    shape: tuple[int, ...]


@dataclass
class Layout:
    """The parts of every layer that adapters of a bank can change.

    Attributes:
        max_rank: The largest rank.
        max_classes: The largest number of classes.
        layers: Path -> layer.
        heads: The paths of the classifiers.
        parts: Every part.
        pages: The number of pages of a slot.
    """

    max_rank: int
    max_classes: int
    layers: dict[str, Layer] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    parts: dict[PartKey, Part] = field(default_factory=dict)
    pages: int = 0

    @classmethod
    def of(cls, layers: BankLayers, max_rank: int, max_classes: int) -> Layout:
        """The layout for the layers of a bank.

        Args:
            layers: The layers.
            max_rank: The largest rank.
            max_classes: The largest number of classes.
        """
        everything = {**layers.adapted, **layers.biased}
        layout = cls(max_rank, max_classes, everything, layers.heads)
        for path, layer in layers.adapted.items():
            kernel = tuple(layer._kernel_variable.shape)
            if path in layers.heads:
                layout._add(path, kernel=(*kernel[:-1], max_classes), shift=(max_classes,))
                continue
            a, b = layer._factor_shapes(kernel, max_rank)
            layout._add(path, a=a, b=b, gain=(layer.output_count(),))
            if layer.shift_refusal() is None:
                layout._add(path, shift=(layer.output_count(),))
        for path, layer in layers.biased.items():
            bias = layer.bias if isinstance(layer, LoRALayer) else layer.beta
            layout._add(path, shift=(math.prod(bias.shape),))
        return layout

    def _add(self, path: str, **shapes: tuple[int, ...]) -> None:
        for name, shape in shapes.items():
            pages = math.ceil(math.prod(shape) / PAGE)
            self.parts[path, name] = Part(self.pages, pages, tuple(shape))
            self.pages += pages

    def random_values(self) -> dict[PartKey, np.ndarray]:
        """Values for every part that change the outputs of every layer, as those of a kernel
        with the usual initial values would."""
        rng = np.random.default_rng(0)
        values = {}
        for (path, name), part in self.parts.items():
            value = rng.normal(size=part.shape)
            if name in ("a", "kernel"):
                value /= math.sqrt(math.prod(part.shape[:-1]))
            elif name == "b":
                value /= math.sqrt(self.max_rank)
            values[path, name] = value
        return values

    def pack(self, values: Mapping[PartKey, np.ndarray]) -> np.ndarray:
        """The pages (pages, PAGE) of values, in float32; zeros where there are none.

        Args:
            values: Part -> its value, whose shape may be smaller: it is padded with zeros at
                the end of each axis.
        """
        slot = np.zeros((self.pages, PAGE), "float32")
        for key, value in values.items():
            part = self.parts[key]
            numbers = slot[part.first : part.first + part.pages].reshape(-1)
            whole = numbers[: math.prod(part.shape)].reshape(part.shape)
            whole[tuple(map(slice, value.shape))] = value
        return slot

    def unpack(self, slot: np.ndarray, key: PartKey) -> np.ndarray:
        """The value of a part in a slot, (pages, PAGE), padded as it is there."""
        part = self.parts[key]
        numbers = slot[part.first : part.first + part.pages].reshape(-1)
        return numbers[: math.prod(part.shape)].reshape(part.shape)
