"""Rename weights from one library's names to another's, with their shapes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from tfimm_lora.families.family import TIMM, V4, V5
from tfimm_lora.families.recognize import Naming
from tfimm_lora.families.templates import Name
from tfimm_lora.layers.qkv import LAYOUTS
from tfimm_lora.zoo.weights.windows import as_window

#: Returns a value of the base model by timm's name of a module or weight, or of a block of it.
OfBase = Callable[[Name], "np.ndarray | None"]

_T = TypeVar("_T")

#: timm's name -> the values of its blocks, or of the whole under None.
Blocks = dict[str, dict["str | None", "_T"]]

#: Weights that timm and transformers hold with axes (1, tokens, width).
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


def renamed_weights(
    weights: Mapping[str, np.ndarray],
    source: Naming,
    target: Naming,
    problems: list[str],
    base: OfBase | None,
) -> dict[str, np.ndarray]:
    """Return weights with the names and shapes of another library.

    Args:
        weights: Name -> value in torch's order of axes.
        source: The naming of the weights.
        target: The naming of the result, of the same family.
        problems: The list to which every weight that cannot be renamed is added.
        base: Returns a weight of the base model, for the missing blocks of a projection that
            the target has in one layer.
    """
    renamed = {}
    for timm, parts in in_blocks(weights, source, True, problems).items():
        layout = layout_of_timm(timm.rpartition(".")[0])
        split_there = target.from_timm(Name(timm, layout[:1]), True) is not None
        if None in parts and layout and split_there:
            parts = dict(zip(layout, np.split(parts[None], len(layout))))
        elif None not in parts and not split_there:
            values = {
                b: parts[b] if b in parts else base and base(Name(timm, b)) for b in layout
            }
            missing = [block for block, value in values.items() if value is None]
            if missing:
                problems.append(
                    f"{timm} lacks the blocks {', '.join(missing)}, whose values are those of "
                    "the base model, which is not given"
                )
                continue
            parts = {None: np.concatenate([values[block] for block in layout])}
        module, _, leaf = timm.rpartition(".")
        size = target.names.window(module) if leaf == "weight" else None
        for block, value in parts.items():
            name = target.from_timm(Name(timm, block), True)
            if name is None:
                problems.append(f"no name for {Name(timm, block)}")
                continue
            try:
                renamed[name] = _with_axes(
                    value if size is None else as_window(value, size), timm, target
                )
            except ValueError as error:
                problems.append(f"{name} {error}")
    return renamed


def _with_axes(value: np.ndarray, timm: str, target: Naming) -> np.ndarray:
    """Return a token or position embedding with the axes that timm and transformers have."""
    is_token = timm.rpartition(".")[2] in _TOKENS and target.library in (TIMM, V4, V5)
    return value.reshape((1,) * (3 - value.ndim) + value.shape) if is_token else value


def in_blocks(
    values: Mapping[str, _T], source: Naming, is_weight: bool, problems: list[str]
) -> Blocks[_T]:
    """Return the values of modules or weights by timm's name and block.

    Names that the source does not have are added to ``problems``.
    """
    blocks: Blocks[_T] = {}
    for name, value in values.items():
        timm = source.to_timm(name, is_weight)
        if timm is None:
            problems.append(f"unknown name {name}")
        else:
            blocks.setdefault(timm.name, {})[timm.block] = value
    return blocks


def layout_of_timm(module: str) -> str:
    """Return the blocks of a projection of timm in their order; "" for another module."""
    layout = LAYOUTS.get(module.rpartition(".")[2], "")
    return layout if len(layout) > 1 else ""
