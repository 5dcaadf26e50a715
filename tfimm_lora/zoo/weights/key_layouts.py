"""The key layouts of timm checkpoints, which are recognized by their keys.

timm 0.9 renamed the modules of Swin, PVTv2 and PoolFormer. tfimm's layers are named like the
old layout, so keys of the new layout are renamed to it. The hub has files of both layouts. All
other families have one layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


class Layout(NamedTuple):
    """A layout that differs from tfimm's names, with the rules to rename its keys."""

    name: str
    #: Whether a set of keys is in this layout.
    recognises: Callable[[set[str]], bool]
    #: Pairs (pattern, replacement). The first rule that matches a key is applied.
    rules: Rules
    #: The tfimm class of these checkpoints.
    architecture: str
    #: The inverse rules, from tfimm's names to the layout. They also apply to module paths.
    inverse: Rules

    def rename(self, key: str) -> str:
        """Convert a key of the layout to tfimm's names."""
        return _apply(self.rules, key)

    def rename_back(self, key: str) -> str:
        """Convert a key with tfimm's names to the layout."""
        return _apply(self.inverse, key)


def _apply(rules: Rules, key: str) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, key)
        if count:
            return renamed
    return key


def _number(name: str, offset: int, factor: int = 1) -> Callable[[re.Match[str]], str]:
    """Return a replacement: ``name`` with {0} computed from the first group."""
    return lambda m: name.format(int(m[1]) * factor + offset, *m.groups()[1:])


def _half(name: str) -> Callable[[re.Match[str]], str]:
    """Return a replacement like ``_number``, with half of the first group, rounded up."""
    return lambda m: name.format((int(m[1]) + 1) // 2, *m.groups()[1:])


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
        "SwinTransformer",
        (
            (r"^layers\.(\d+)\.downsample\b(.*)", _number("layers.{0}.downsample{1}", 1)),
            (r"^head\b", "head.fc"),
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
        "PyramidVisionTransformerV2",
        (
            (r"^patch_embed1\b", "patch_embed"),
            (r"^patch_embed(\d+)\b(.*)", _number("stages.{0}.downsample{1}", -1)),
            (
                r"^block(\d+)\.(\d+)\.mlp\.dwconv\.dwconv\b(.*)",
                _number("stages.{0}.blocks.{1}.mlp.dwconv{2}", -1),
            ),
            (r"^block(\d+)\b(.*)", _number("stages.{0}.blocks{1}", -1)),
            (r"^norm(\d+)\b(.*)", _number("stages.{0}.norm{1}", -1)),
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
        "PoolFormer",
        (
            (r"^patch_embed\.proj\b", "stem.conv"),
            (r"^network\.(\d*[13579])\.proj\b(.*)", _half("stages.{0}.downsample.conv{1}")),
            (
                r"^network\.(\d+)\.(\d+)\.layer_scale_(\d)$",
                _half("stages.{0}.blocks.{1}.layer_scale{2}.scale"),
            ),
            (r"^network\.(\d+)\.(\d+)\b(.*)", _half("stages.{0}.blocks.{1}{2}")),
            (r"^norm\b", "head.norm"),
            (r"^head\b", "head.fc"),
        ),
    ),
)


def layout_of_model(model: object) -> Layout | None:
    """Return timm's current layout of a model, or None if tfimm uses the same names."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((layout for layout in LAYOUTS if layout.architecture in names), None)


def find_layout(keys: Iterable[str]) -> Layout | None:
    """Return the layout of a checkpoint, or None if its keys have tfimm's names."""
    found = set(keys)
    return next((layout for layout in LAYOUTS if layout.recognises(found)), None)
