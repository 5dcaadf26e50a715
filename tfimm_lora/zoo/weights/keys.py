"""Map variables of a tfimm model to tensors of a timm checkpoint: names and axes.

All differences between the two in the names of variables and in the order of axes are here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.config import LORA_VARIABLE_NAMES
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import lora_class

#: Patterns of checkpoint tensors that tfimm does not use, and the reason.
IGNORED_IN_CHECKPOINT = {
    r"\.num_batches_tracked$": "a counter of torch's BatchNorm, not used in inference",
    r"\.relative_position_index$": "computed from the window size (Swin)",
    r"\.attn_mask$": "computed from the input size (Swin)",
    r"\.filt$|\.blur_kernel$": "the fixed kernel of a blur pooling",
}

#: Patterns of variables that are not in checkpoints: constants that ``build`` computes.
IGNORED_IN_MODEL = {
    r"(^|/)relative_position_index$": "computed from the window size (Swin)",
    r"(^|/)attn_mask$": "computed from the input size (Swin)",
    r"(^|/)blur_kernel$": "the fixed kernel of a blur pooling",
    r"(^|/)position_ids$": "the numbers of the positions (CLIP, SigLIP)",
}

#: The last part of a variable's name -> its possible names in timm, the likeliest first.
_LEAVES = {
    "kernel": ("weight",),
    "depthwise_kernel": ("weight",),
    "embeddings": ("weight",),
    "gamma": ("weight", "gamma"),
    "beta": ("bias", "beta"),
    "moving_mean": ("running_mean",),
    "moving_variance": ("running_var",),
}


class CheckpointVariable(NamedTuple):
    """A variable of a model whose value is in a checkpoint."""

    #: For example "blocks/0/attn/qkv/kernel", without the name of the model.
    name: str
    layer: Any
    variable: Any

    @property
    def keys(self) -> tuple[str, ...]:
        """Its possible keys in a checkpoint, the likeliest first."""
        path, _, leaf = self.name.rpartition("/")
        prefix = key_of_path(path)
        leaves = _LEAVES.get(leaf, (leaf,))
        return tuple(f"{prefix}.{x}" if prefix else x for x in leaves)


def checkpoint_variables(model: Any) -> Iterator[CheckpointVariable]:
    """Yield the variables of a model whose values are in a checkpoint.

    LoRA factors and constants that ``build`` computes are left out.
    """
    backend = backend_of(model)
    for path, layer in backend.walk(model):
        for variable in backend.own_variables(layer):
            leaf = backend.variable_name(variable)
            if isinstance(layer, LoRALayer) and leaf in LORA_VARIABLE_NAMES:
                continue
            name = f"{path}/{_scoped(path, variable, leaf)}" if path else leaf
            if not any(re.search(pattern, name) for pattern in IGNORED_IN_MODEL):
                yield CheckpointVariable(name, layer, variable)


def _scoped(path: str, variable: Any, leaf: str) -> str:
    """Return a variable's name within its layer, with the layer's own name scopes.

    The prompt embeddings of SAM are variables of one layer, all called "weight".
    """
    full = "/" + variable.name.partition(":")[0]
    rest = full.partition(f"/{path}/")[2]
    return rest if rest.endswith(f"/{leaf}") else leaf


def is_ignored_in_checkpoint(key: str) -> bool:
    """Whether tfimm does not use a tensor of a checkpoint."""
    return any(re.search(pattern, key) for pattern in IGNORED_IN_CHECKPOINT)


def key_of_path(path: str) -> str:
    """Convert a layer's path to timm's form: "stages/0/blocks/1" -> "stages.0.blocks.1".

    tfimm marks levels that timm does not have with the name "remove" or with three underscores
    at the end, and writes "_._" for a level that Keras does not have.
    """
    parts = path.replace("_._", "/").split("/")
    parts = [part.rpartition("___")[2] for part in parts]
    return ".".join(part for part in parts if part and part != "remove")


def torch_axes(leaf: str, rank: int) -> tuple[int, ...] | None:
    """Return the axes that transpose a torch tensor to a Keras kernel; None for no change."""
    if leaf == "depthwise_kernel":
        return (2, 3, 0, 1)
    if leaf == "kernel" and rank == 4:
        return (2, 3, 1, 0)
    if leaf == "kernel" and rank in (2, 3):
        return tuple(reversed(range(rank)))
    return None


def expected_shape(target: CheckpointVariable) -> tuple[int, ...]:
    """Return the shape of a variable in torch's order of axes."""
    shape = tuple(target.variable.shape)
    einsum = _einsum_class(target)
    if einsum is None:
        axes = torch_axes(leaf_of(target), len(shape))
        return tuple(shape[axes.index(i)] for i in range(len(axes))) if axes else shape
    if leaf_of(target) == "bias":
        return (math.prod(shape),)
    of_kernel: tuple[int, ...] = einsum.torch_kernel_shape(target.layer, shape)
    return of_kernel


def fits(shape: Collection[int], target: CheckpointVariable) -> bool:
    """Whether a tensor of this shape is the value of a variable, ignoring axes of size 1.

    Some linear layers of one library are 1x1 convolutions in the other.
    """
    return _without_ones(shape) == _without_ones(expected_shape(target))


def to_keras(value: np.ndarray, target: CheckpointVariable) -> np.ndarray:
    """Convert a torch tensor to the value of a variable; its shape must fit."""
    value = value.reshape(expected_shape(target))
    einsum = _einsum_class(target)
    if einsum is None:
        axes = torch_axes(leaf_of(target), value.ndim)
        return value.transpose(axes) if axes else value
    shape = tuple(target.variable.shape)
    if leaf_of(target) == "bias":
        return value.reshape(shape)
    kernel: np.ndarray = einsum.kernel_from_torch(target.layer, value, shape)
    return kernel


def to_torch(value: np.ndarray, target: CheckpointVariable) -> np.ndarray:
    """Return the value of a variable in torch's order of axes; the inverse of ``to_keras``."""
    einsum = _einsum_class(target)
    if einsum is None:
        axes = torch_axes(leaf_of(target), value.ndim)
        return value.transpose(np.argsort(axes)) if axes else value
    if leaf_of(target) == "bias":
        return value.reshape(-1)
    kernel: np.ndarray = einsum.kernel_to_torch(target.layer, value)
    return kernel


def torch_leaf(target: CheckpointVariable) -> str:
    """Return torch's name of a weight in its module: "weight", "running_mean".

    A gamma outside of a norm keeps its name. The number of a variable that Keras named, which
    differs between models, is left out.
    """
    is_norm = "Normalization" in "".join(cls.__name__ for cls in type(target.layer).__mro__)
    leaf = target.name.rpartition("/")[2]
    leaf = re.sub(r"^variable_\d+$", "variable", leaf)
    keeps_name = leaf in ("gamma", "beta") and not is_norm
    return _LEAVES.get(leaf, (leaf,))[-1 if keeps_name else 0]


def _einsum_class(target: CheckpointVariable) -> Any:
    """Return the LoRA class of an einsum layer that is a matrix product, or None."""
    if all(cls.__name__ != "EinsumDense" for cls in type(target.layer).__mro__):
        return None
    if leaf_of(target) not in ("kernel", "bias"):
        return None
    cls: Any = lora_class(type(target.layer))
    return None if cls.update_kind(target.layer) == "batched" else cls


def leaf_of(target: CheckpointVariable) -> str:
    """Return the last part of a variable's name, which is the same in both Kerases."""
    leaf = target.name.rpartition("/")[2]
    # Keras 3 calls the kernel of a depthwise convolution "kernel".
    depthwise = any(cls.__name__ == "DepthwiseConv2D" for cls in type(target.layer).__mro__)
    return "depthwise_kernel" if leaf == "kernel" and depthwise else leaf


def _without_ones(shape: Collection[int]) -> list[int]:
    return [size for size in shape if size != 1]
