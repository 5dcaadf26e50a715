"""DoRA: the norms of a kernel's columns as variables of their own.

    W' = g (W + s A B),    g = (|W| + d) / |W + s A B|

with |.| the norm over all axes that the product sums over, so that there is one number for each
output. d, the variable, is the difference of the magnitude m = |W| + d from the norm of the
frozen kernel. It starts at zero whatever W is, its gradient is that of m, and weight decay on
it pulls towards the kernel rather than towards nothing. The norm below is a constant to the
gradient (section 4.3 of the paper), so the gradient by A and B is g times that of LoRA.

Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from __future__ import annotations

from typing import Any


def norm(ops: Any, kernel: Any, axes: tuple[int, ...]) -> Any:
    """The norm over some axes, which stay with size one."""
    return ops.sqrt(ops.sum(kernel * kernel, axis=axes, keepdims=True))


def gain(ops: Any, kernel: Any, adapted: Any, offset: Any, axes: tuple[int, ...]) -> Any:
    """g, in the shape of the kernel with size one along ``axes``.

    It is exactly 1 where d is 0 and nothing is adapted, and where W + s A B is zero (an output
    that a pruned network has no weights for), of which g has no meaning.
    """
    below = norm(ops, ops.stop_gradient(adapted), axes)
    above = norm(ops, kernel, axes)
    above = above + ops.reshape(offset, ops.shape(above))
    dead = ops.equal(below, 0)
    return ops.where(dead, 1.0, above / ops.where(dead, 1.0, below))


def shape(kernel_shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of d."""
    return tuple(size for axis, size in enumerate(kernel_shape) if axis not in axes)


def scaled(ops: Any, outputs: Any, factor: Any, narrow: bool) -> Any:
    """Outputs times g, with g's small differences from one kept in 16-bit arithmetic."""
    if not narrow:
        return outputs * ops.cast(factor, outputs.dtype)
    return outputs + outputs * ops.cast(factor - 1.0, outputs.dtype)
