"""Which tensor of a timm checkpoint a variable of a tfimm model takes, and in which form.

The one place that knows how tfimm names what timm names otherwise, and in which order the
two keep the axes of a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.config import LORA_VARIABLE_NAMES
from tfimm_lora.layers.base import LoRALayer

#: Tensors of checkpoints that tfimm has no place for, and why that is right.
IGNORED_IN_CHECKPOINT = {
    r"\.num_batches_tracked$": "a counter of torch's BatchNorm, not used in inference",
    r"\.relative_position_index$": "computed from the window size (Swin)",
    r"\.attn_mask$": "computed from the input size (Swin)",
    r"\.filt$|\.blur_kernel$": "the fixed kernel of a blur pooling",
}

#: Variables of tfimm models that no checkpoint has to give: constants made in building.
IGNORED_IN_MODEL = {
    r"(^|/)relative_position_index$": "computed from the window size (Swin)",
    r"(^|/)attn_mask$": "computed from the input size (Swin)",
    r"(^|/)blur_kernel$": "the fixed kernel of a blur pooling",
}

#: The last part of a variable's name -> the names that timm may give it, likeliest first.
_LEAVES = {
    "kernel": ("weight",),
    "depthwise_kernel": ("weight",),
    "embeddings": ("weight",),
    "gamma": ("weight", "gamma"),
    "beta": ("bias", "beta"),
    "moving_mean": ("running_mean",),
    "moving_variance": ("running_var",),
}


class Wanted(NamedTuple):
    """A variable of a model that a checkpoint has to give."""

    #: "blocks/0/attn/qkv/kernel", independent of the model's own name.
    name: str
    layer: Any
    variable: Any

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that it may have in a checkpoint, likeliest first."""
        path, _, leaf = self.name.rpartition("/")
        prefix = key_of_path(path)
        leaves = _LEAVES.get(leaf, (leaf,))
        return tuple(f"{prefix}.{x}" if prefix else x for x in leaves)


def wanted_variables(model: Any) -> Iterator[Wanted]:
    """The variables of a model that a checkpoint has to give.

    LoRA factors and constants made in building are left out.
    """
    backend = backend_of(model)
    for path, layer in backend.walk(model):
        for variable in backend.own_variables(layer):
            leaf = backend.variable_name(variable)
            if isinstance(layer, LoRALayer) and leaf in LORA_VARIABLE_NAMES:
                continue
            name = f"{path}/{_scoped(path, variable, leaf)}" if path else leaf
            if not any(re.search(pattern, name) for pattern in IGNORED_IN_MODEL):
                yield Wanted(name, layer, variable)


def _scoped(path: str, variable: Any, leaf: str) -> str:
    """A variable's name below its layer, with the scopes in which the layer made it.

    The embeddings of SAM's prompts are variables of one layer, all called "weight".
    """
    full = "/" + variable.name.partition(":")[0]
    rest = full.partition(f"/{path}/")[2]
    return rest if rest.endswith(f"/{leaf}") else leaf


def is_ignored_in_checkpoint(key: str) -> bool:
    """Whether a tensor of a checkpoint has no place in tfimm, by rule."""
    return any(re.search(pattern, key) for pattern in IGNORED_IN_CHECKPOINT)


def key_of_path(path: str) -> str:
    """A layer's path as timm writes it: "stages/0/blocks/1" -> "stages.0.blocks.1".

    tfimm has levels that timm has not, which it calls "remove" or ends in three
    underscores, and writes "_._" for a level that Keras has not.
    """
    parts = path.replace("_._", "/").split("/")
    parts = [part.rpartition("___")[2] for part in parts]
    return ".".join(part for part in parts if part and part != "remove")


def torch_axes(leaf: str, rank: int) -> tuple[int, ...] | None:
    """The axes by which a tensor of torch is transposed for a kernel of Keras."""
    if leaf == "depthwise_kernel":
        return (2, 3, 0, 1)
    if leaf == "kernel" and rank == 4:
        return (2, 3, 1, 0)
    if leaf == "kernel" and rank in (2, 3):
        return tuple(reversed(range(rank)))
    return None


def expected_shape(wanted: Wanted) -> tuple[int, ...]:
    """The shape that a variable has in torch's order of axes."""
    shape = tuple(wanted.variable.shape)
    axes = torch_axes(leaf_of(wanted), len(shape))
    return tuple(shape[axes.index(i)] for i in range(len(axes))) if axes else shape


def fits(shape: Collection[int], wanted: Wanted) -> bool:
    """Whether a tensor of this shape is the value of a variable, but for axes of size one.

    A linear layer of the one library is a 1x1 convolution in the other, here and there.
    """
    return _without_ones(shape) == _without_ones(expected_shape(wanted))


def to_keras(value: np.ndarray, wanted: Wanted) -> np.ndarray:
    """A tensor of torch as the value of a variable; its shape must fit."""
    value = value.reshape(expected_shape(wanted))
    axes = torch_axes(leaf_of(wanted), value.ndim)
    return value.transpose(axes) if axes else value


def leaf_of(wanted: Wanted) -> str:
    """What kind of variable it is: the last part of its name, the same in both Kerases."""
    leaf = wanted.name.rpartition("/")[2]
    # Keras 3 calls the kernel of a depthwise convolution as it calls any other.
    depthwise = any(cls.__name__ == "DepthwiseConv2D" for cls in type(wanted.layer).__mro__)
    return "depthwise_kernel" if leaf == "kernel" and depthwise else leaf


def _without_ones(shape: Collection[int]) -> list[int]:
    return [size for size in shape if size != 1]
