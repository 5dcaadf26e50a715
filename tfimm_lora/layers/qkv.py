"""The query, key and value blocks of a fused projection, each with an update of its own.

A fused projection of attention has a kernel (in, n d) whose columns are n blocks of equal
width d. To adapt p of them each gets its own A (in, r) and B (r, d). They are kept stacked,
A: (in, p r) and B: (p r, d). Where they are used B is widened with zeros to (p r, n d): then A
and B are the factors of a plain update of rank p r. The gradient of widening is its reverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.layer_paths import without_counts

#: The blocks of a projection of attention, by the name of its layer.
LAYOUTS = {
    **dict.fromkeys(("qkv", "attention_qkv"), "qkv"),
    "kv": "kv",
    **dict.fromkeys(("q", "query", "q_proj", "to_q"), "q"),
    **dict.fromkeys(("k", "key", "k_proj", "to_k"), "k"),
    **dict.fromkeys(("v", "value", "v_proj", "to_v"), "v"),
}


def layout_of(path: str) -> str | None:
    """The blocks in the kernel of a layer, in their order, or None for another layer."""
    return LAYOUTS.get(without_counts(path).rpartition("/")[2])


def selection(chosen: str, layout: str) -> np.ndarray:
    """A matrix (p, n) with a 1 where a chosen block is the block of the layout."""
    return np.array([[float(a == b) for b in layout] for a in chosen], "float32")


def widen(ops: Any, b: Any, chosen: str, layout: str) -> Any:
    """B of the chosen blocks, (p r, d), as that of the whole kernel, (p r, n d).

    ``ops`` are the array functions of a backend, or NumPy; b is in float32.
    """
    stacked = ops.reshape(b, (len(chosen), -1, b.shape[1]))
    wide = ops.einsum("prd,pn->prnd", stacked, selection(chosen, layout))
    return ops.reshape(wide, (b.shape[0], -1))


def narrow(wide: np.ndarray, chosen: str, layout: str) -> np.ndarray:
    """The reverse of ``widen``, for NumPy arrays; what is outside of the blocks is dropped."""
    blocks = wide.reshape(len(chosen), wide.shape[0] // len(chosen), len(layout), -1)
    kept = np.einsum("prnd,pn->prd", blocks, selection(chosen, layout))
    result: np.ndarray = kept.reshape(wide.shape[0], -1)
    return result


def moves_only(wide: np.ndarray, chosen: str, layout: str) -> bool:
    """Whether a B of the whole kernel, (p r, n d), is zero outside of the chosen blocks."""
    if wide.shape[0] % len(chosen) or wide.shape[1] % len(layout):
        return False
    return np.array_equal(widen(np, narrow(wide, chosen, layout), chosen, layout), wide)


def side_by_side(ops: Any, factors: list[tuple[Any, Any]], count: int) -> tuple[Any, Any]:
    """Stacked factors of some updates of ``count`` blocks as those of their sum."""
    a = [ops.reshape(x, (x.shape[0], count, -1)) for x, _ in factors]
    b = [ops.reshape(y, (count, -1, y.shape[1])) for _, y in factors]
    rows, width = factors[0][0].shape[0], factors[0][1].shape[1]
    return (
        ops.reshape(ops.concatenate(a, axis=2), (rows, -1)),
        ops.reshape(ops.concatenate(b, axis=1), (-1, width)),
    )


def halves(a: np.ndarray, b: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The reverse of ``side_by_side`` for two updates of one rank, for NumPy arrays."""
    split_a = np.split(a.reshape(a.shape[0], count, -1), 2, axis=2)
    split_b = np.split(b.reshape(count, -1, b.shape[1]), 2, axis=1)
    return [
        (x.reshape(a.shape[0], -1), y.reshape(-1, b.shape[1])) for x, y in zip(split_a, split_b)
    ]
