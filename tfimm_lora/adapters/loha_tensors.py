"""The tensors of LoHa in PEFT's files.

    dW = (w1_a w1_b) * (w2_a w2_b),    w_a: (out, r),  w_b: (r, in * kernel size)

So ``w_a`` is B and ``w_b`` is A, without axes for the window of a convolution. The second pair
is A and B here, the first A2 and B2. With use_effective_conv2d each pair has a third factor t,
(r, r, kh, kw): A is the product of t and w_b, (r, in), and B the transpose of w_a, (r, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.layers.forward import Factors

#: The beginning of the names of all of them.
PREFIX = "hada_"


def tensors_of(update: LayerUpdate) -> dict[str, np.ndarray]:
    """Return the tensors of an update of LoHa by name."""
    tensors = {}
    for number, (a, b) in zip((2, 1), update.pairs()):
        tensors[f"{PREFIX}w{number}_a"] = b.reshape(len(b), -1)
        tensors[f"{PREFIX}w{number}_b"] = a.reshape(len(a), -1)
    return tensors


def pairs_from(module: str, tensors: Mapping[str, np.ndarray], window: Any) -> list[Factors]:
    """Return (A, B) and (A2, B2) from the tensors of a module.

    Args:
        module: The module, for errors.
        tensors: Name -> value.
        window: The shape of A without the rank, (in, *kernel size), if the file says it.

    Raises:
        ValueError: If tensors are missing or do not fit. The message is the end of a sentence.
    """
    pairs = [_pair(module, number, tensors) for number in (2, 1)]
    if len({(a.shape, b.shape) for a, b in pairs}) > 1:
        raise ValueError(f"has {_shapes(tensors)} for {module}, which do not fit")
    if window is None:
        return pairs
    sizes = isinstance(window, list) and all(type(n) is int and n > 0 for n in window)
    if not sizes or any(a.ndim != 2 or math.prod(window) != a.shape[1] for a, _ in pairs):
        raise ValueError(f"has damaged metadata of tfimm_lora for {module}")
    ones = [1] * (len(window) - 1)
    return [(a.reshape(len(a), *window), b.reshape(*b.shape, *ones)) for a, b in pairs]


def _pair(module: str, number: int, tensors: Mapping[str, np.ndarray]) -> Factors:
    """Return A and B of one pair."""
    for name in (f"{PREFIX}w{number}_a", f"{PREFIX}w{number}_b"):
        if name not in tensors:
            raise ValueError(f"has no {name} for {module}")
    b, a = tensors[f"{PREFIX}w{number}_a"], tensors[f"{PREFIX}w{number}_b"]
    third = tensors.get(f"{PREFIX}t{number}")
    fitting = a.ndim == b.ndim == 2 and a.size and b.size
    if third is None:
        fitting = fitting and a.shape[0] == b.shape[1]
    else:
        fitting = fitting and third.ndim == 4 and third.size
        fitting = fitting and third.shape[:2] == (len(b), len(a)) == (len(a), len(b))
    if not fitting:
        raise ValueError(f"has {_shapes(tensors)} for {module}, which do not fit")
    if third is None:
        return a, b
    return np.einsum("ijkl,jn->inkl", third, a), b.T[:, :, None, None]


def _shapes(tensors: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {value.shape}" for name, value in sorted(tensors.items()))
