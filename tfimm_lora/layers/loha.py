"""LoHa: the elementwise product of two low-rank products.

    W' = W + s (A B) * (A2 B2)

The rank of the update is up to r^2, with the parameters of LoRA of rank 2 r. It is that of LoRA
with the factors

    A'[i, (p, q)] = A[i, p] A2[i, q],    B'[(p, q), o] = B[p, o] B2[q, o],

with which it can be computed without the whole kernel, and of which it is a special case.

Reference: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient
Federated Learning", arXiv:2108.06098; Yeh et al., "Navigating Text-To-Image Customization"
(LyCORIS), arXiv:2309.14859.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: The standard deviations of the initial factors; B is zero. They are those of LyCORIS.
DEVIATIONS = {"kernel_lora_a": 1.0, "kernel_lora_a2": 1.0, "kernel_lora_b2": 0.1}


def lora_factors(
    ops: Any,
    pairs: Sequence[tuple[Any, Any]],
    axis_of_a: int,
    axis_of_b: int,
    blocks: int = 1,
) -> tuple[Any, Any]:
    """A' and B', from (A, B) and (A2, B2).

    Args:
        ops: Array functions of a backend, or NumPy.
        pairs: (A, B) and (A2, B2).
        axis_of_a, axis_of_b: The axes of A and of B that are the rank.
        blocks: The number of blocks of a fused projection with factors of their own. The
            products of factors of different blocks are zero, and left out.
    """
    (a, b), (a2, b2) = pairs
    return _products(ops, a, a2, axis_of_a, blocks), _products(ops, b, b2, axis_of_b, blocks)


def _products(ops: Any, x: Any, y: Any, axis: int, blocks: int) -> Any:
    """The products of all pairs of entries along an axis, which has equal blocks."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    rank = x.shape[axis] // blocks
    left = ops.reshape(x, (*before, blocks, rank, 1, *after))
    right = ops.reshape(y, (*before, blocks, 1, rank, *after))
    return ops.reshape(left * right, (*before, blocks * rank * rank, *after))
