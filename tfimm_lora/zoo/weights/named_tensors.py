"""The tensors of a checkpoint by timm's names, whichever library wrote it."""

from __future__ import annotations

import re

import numpy as np

from tfimm_lora.families.family import TIMM, Family
from tfimm_lora.families.recognize import Naming, recognize
from tfimm_lora.families.templates import Name
from tfimm_lora.layers.qkv import LAYOUTS
from tfimm_lora.zoo.weights.key_layouts import Layout, find_layout
from tfimm_lora.zoo.weights.keys import is_ignored_in_checkpoint
from tfimm_lora.zoo.weights.tensor_files import FLOATS, Tensors

#: timm's position embeddings.
_POSITIONS = "pos_embed"

#: The rows of torch's MultiheadAttention: query, key and value.
_IN_PROJ = re.compile(r"(?P<attention>.*\.)in_proj_(?P<leaf>weight|bias)")

#: timm's names of these rows, by that of the output projection: SigLIP's pooling.
_ROWS = {
    "attn_pool.proj": (
        Name("attn_pool.q"),
        Name("attn_pool.kv", "k"),
        Name("attn_pool.kv", "v"),
    )
}


class NamedTensors:
    """The tensors of a checkpoint by timm's current names.

    A fused projection may be requested that the file has in blocks, and the reverse.

    Args:
        tensors: The tensors of the file.
        family: The family of the model to load, or None if it is not known.
        layout: The current key layout of that family, if timm changed it.

    Attributes:
        naming: The naming of the file; None for timm's names.
        unknown: The keys that have no name in timm.
    """

    def __init__(self, tensors: Tensors, family: Family | None, layout: Layout | None) -> None:
        self._tensors = tensors
        keys = [key for key in tensors.shapes if not is_ignored_in_checkpoint(key)]
        self.naming = _naming(keys, family)
        # The names of timm before 0.9 are renamed to the current ones.
        old = layout if layout is not None and find_layout(keys) is not layout else None
        # timm adds no position to the class token: zero is added to it.
        of_timm = self.naming is None or self.naming.library == TIMM
        self._adds_position = of_timm and family is not None and family.patch_positions
        self._files: dict[Name, str] = {}
        self._thirds: dict[Name, int] = {}
        self.unknown: list[str] = []
        for key in keys:
            name: Name | None = Name(old.rename_back(key) if old else key)
            if self.naming is not None:
                name = self.naming.to_timm(key, is_weight=True)
            if name is not None:
                self._files[name] = key
            elif rows := self._rows(key):
                self._files.update(dict.fromkeys(rows, key))
                self._thirds.update({row: i for i, row in enumerate(rows)})
            else:
                self.unknown.append(key)

    def _rows(self, key: str) -> list[Name]:
        """Return timm's names of the query, key and value in one tensor, if it has these."""
        found = _IN_PROJ.fullmatch(key)
        if found is None or self.naming is None:
            return []
        output = self.naming.to_timm(f"{found['attention']}out_proj.weight", is_weight=True)
        module = "" if output is None else output.name.rpartition(".")[0]
        return [name.leaf(found["leaf"]) for name in _ROWS.get(module, ())]

    def keys(self) -> dict[Name, str]:
        """Return timm's names and the keys in the file."""
        return dict(self._files)

    def sources(self, name: Name) -> list[Name]:
        """Return the tensors of the file that hold a weight; empty if it has none."""
        if name in self._files:
            return [name]
        if name.block is not None:
            return [Name(name.name)] if Name(name.name) in self._files else []
        blocks = [Name(name.name, block) for block in _layout(name)]
        return blocks if blocks and all(block in self._files for block in blocks) else []

    def key(self, name: Name) -> str:
        """Return the key in the file of one of the ``sources``."""
        return self._files[name]

    def shape(self, name: Name) -> tuple[int, ...] | None:
        """Return the shape of a weight, or None if the file does not have it."""
        found = self.sources(name)
        if not found:
            return None
        shapes = [self._tensors.shapes[self._files[x]] for x in found]
        if self._adds_position and name.name == _POSITIONS:
            return (1, shapes[0][1] + 1, shapes[0][2])
        if found[0] in self._thirds and shapes[0][0] % 3 == 0:
            return (shapes[0][0] // 3, *shapes[0][1:])
        first = sum(shape[0] if shape else 1 for shape in shapes)
        if name.block is not None and found[0].block is None:
            return (first // len(_layout(name)), *shapes[0][1:])
        return (first, *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def wrong_type(self, name: Name) -> str | None:
        """Return the type of a weight that is not floating point, or None."""
        types = [self._tensors.types[self._files[x]] for x in self.sources(name)]
        return next((found for found in types if found not in FLOATS), None)

    def read(self, name: Name) -> np.ndarray:
        """Return the value of a weight."""
        found = self.sources(name)
        values = [self._tensors.read(self._files[x]) for x in found]
        if self._adds_position and name.name == _POSITIONS:
            padded: np.ndarray = np.pad(values[0], ((0, 0), (1, 0), (0, 0)))
            return padded
        if found[0] in self._thirds:
            third: np.ndarray = np.split(values[0], 3)[self._thirds[found[0]]]
            return third
        if name.block is not None and found[0].block is None:
            layout = _layout(name)
            rows: np.ndarray = np.split(values[0], len(layout))[layout.index(name.block)]
            return rows
        joined: np.ndarray = np.concatenate(values) if len(values) > 1 else values[0]
        return joined


def _layout(name: Name) -> str:
    """Return the blocks of the projection that a weight is of: "qkv"."""
    module = name.name.rpartition(".")[0]
    return LAYOUTS.get(module.rpartition(".")[2], "")


def _naming(keys: list[str], family: Family | None) -> Naming | None:
    """Return the naming of a file, or None if it has timm's names without a prefix."""
    found = recognize(keys, family=family, is_weight=True)
    if found is None or (found.library == "timm" and not found.prefix):
        return None
    translated = sum(found.to_timm(key, True) is not None for key in keys)
    if family is None:  # a few names of another family may look alike
        return found if translated == len(keys) else None
    known = sum(Naming(family, "timm").to_timm(key, True) is not None for key in keys)
    return found if translated > known else None
