"""The key layouts of timm checkpoints, told apart by their keys.

timm 0.9 renamed the parts of Swin, PVTv2 and PoolFormer. tfimm's layers are named like the
old layout, so that one is the norm here: keys of the new one are renamed to it. Files of
either layout are on the hub. Every other family has one layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Layout(NamedTuple):
    """One layout that differs from tfimm's names, and how its keys are renamed to them."""

    name: str
    #: Whether a set of keys is in this layout.
    recognises: Callable[[set[str]], bool]
    #: Rules (pattern, replacement), of which the first that matches a key is applied.
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

    def rename(self, key: str) -> str:
        for pattern, replacement in self.rules:
            renamed, count = re.subn(pattern, replacement, key)
            if count:
                return renamed
        return key


def _number(name: str, offset: int, factor: int = 1) -> Callable[[re.Match[str]], str]:
    """A replacement ``name`` in which {0} is a number computed from the first group."""
    return lambda m: name.format(int(m[1]) * factor + offset, *m.groups()[1:])


LAYOUTS = (
    Layout(
        "Swin of timm 0.9 and later",
        # The first stage had the first downsampling; now the second stage has it.
        lambda keys: (
            "layers.1.downsample.reduction.weight" in keys
            and "layers.0.downsample.reduction.weight" not in keys
            and "layers.0.blocks.0.attn.relative_position_bias_table" in keys
        ),
        (
            (r"^layers\.(\d+)\.downsample\.(.+)", _number("layers.{0}.downsample.{1}", -1)),
            (r"^head\.fc\.", "head."),
        ),
    ),
    Layout(
        "PVTv2 of timm 0.9 and later",
        lambda keys: (
            "patch_embed.proj.weight" in keys
            and "stages.0.blocks.0.mlp.dwconv.weight" in keys
            and "stages.0.norm.weight" in keys
        ),
        (
            (r"^patch_embed\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.(.+)", _number("patch_embed{0}.{1}", 1)),
            (
                r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.dwconv\.(.+)",
                _number("block{0}.{1}.mlp.dwconv.dwconv.{2}", 1),
            ),
            (r"^stages\.(\d+)\.blocks\.(.+)", _number("block{0}.{1}", 1)),
            (r"^stages\.(\d+)\.norm\.(.+)", _number("norm{0}.{1}", 1)),
        ),
    ),
    Layout(
        "PoolFormer of timm 0.9 and later",
        lambda keys: (
            "stem.conv.weight" in keys and "stages.0.blocks.0.layer_scale1.scale" in keys
        ),
        (
            (r"^stem\.conv\.", "patch_embed.proj."),
            (
                r"^stages\.(\d+)\.downsample\.conv\.(.+)",
                _number("network.{0}.proj.{1}", -1, factor=2),
            ),
            (
                r"^stages\.(\d+)\.blocks\.(\d+)\.layer_scale(\d)\.scale$",
                _number("network.{0}.{1}.layer_scale_{2}", 0, factor=2),
            ),
            (
                r"^stages\.(\d+)\.blocks\.(.+)",
                _number("network.{0}.{1}", 0, factor=2),
            ),
            (r"^head\.norm\.", "norm."),
            (r"^head\.fc\.", "head."),
        ),
    ),
)


def find_layout(keys: Iterable[str]) -> Layout | None:
    """The layout of a checkpoint, or None where its keys are named like tfimm's layers."""
    found = set(keys)
    return next((layout for layout in LAYOUTS if layout.recognises(found)), None)
