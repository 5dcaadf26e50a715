"""DoRA: the norms of a kernel's columns as trained variables.

    W' = g (W + s A B),    g = (|W| + d) / |W + s A B|

|.| is the norm over all axes that the product sums over, so there is one for each output. The
variable d is the difference between the magnitude m = |W| + d and the norm of the frozen
kernel. It is initialized to zero, whatever W is; its gradient is that of m; and weight decay
pulls it towards the kernel instead of towards zero. The norm in the denominator is a constant
for the gradient (section 4.3 of the paper), so the gradients of A and B are g times those of
LoRA.

Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

from __future__ import annotations

from tfimm_lora.backend.interface import Ops, Tensor


def norm(ops: Ops, kernel: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The norm over some axes, which are kept with size one."""
    return ops.sqrt(ops.sum(kernel * kernel, axis=axes, keepdims=True))


def gain(
    ops: Ops, kernel: Tensor, adapted: Tensor, offset: Tensor, axes: tuple[int, ...]
) -> Tensor:
    """g, in the shape of the kernel with size one along ``axes``.

    It is exactly 1 if d is 0 and nothing is adapted, and where W + s A B is zero (an output
    without weights in a pruned network), for which g is not defined.
    """
    below = norm(ops, ops.stop_gradient(adapted), axes)
    above = norm(ops, kernel, axes)
    above = above + ops.reshape(offset, ops.shape(above))
    dead = ops.equal(below, 0)
    return ops.where(dead, 1.0, above / ops.where(dead, 1.0, below))


def shape(kernel_shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of d."""
    return tuple(size for axis, size in enumerate(kernel_shape) if axis not in axes)


def scaled(ops: Ops, outputs: Tensor, factor: Tensor, narrow: bool) -> Tensor:
    """Outputs times g; in 16-bit arithmetic the small differences of g from one are kept."""
    if not narrow:
        return outputs * ops.cast(factor, outputs.dtype)
    return outputs + outputs * ops.cast(factor - 1.0, outputs.dtype)
