"""How the update A B enters a layer's product with its kernel, in three forms.

A layer's product is linear in its input x and in its kernel W. A ``Product`` says how to form
it, and how its update splits it into two narrow products, h = x A and h B. The functions here
turn any ``Product`` into the output of an adapted layer, with the scale s = alpha / rank.
``forms`` chooses between them:

* ``factored``: x W + s (x A) B, differentiated automatically. Dropout on the input of the
  branch is possible.
* ``effective``: one product with W + s A B, differentiated automatically. The gradients of A
  and B are taken from that of the whole kernel.
* ``effective_narrow``: the same product, whose gradients of A and B are computed through the
  narrow products, so that the gradient of the whole kernel is never formed.

Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tfimm_lora.backend.interface import Backend, Tensor


class Product(Protocol):
    """A product that is linear in x and in the kernel, and how A and B enter it."""

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        """The layer's product, before bias and activation."""

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        """A B, in the shape of the kernel."""

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """h = x A: the narrow product, with the rank as its number of channels."""

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """h B: back to the shape of the output."""

    # For ``effective_narrow``:

    def plain_down(self, x: Tensor, a: Tensor) -> Tensor:
        """``down`` without gradients of its own, because it is part of a gradient."""

    def apply_with_gradient(
        self, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``apply``, and the function from the output's gradient to that of x."""

    def up_input_gradient(self, b: Tensor, dy: Tensor) -> Tensor:
        """The gradient of h, from that of ``up(h, b)``."""

    def up_factor_gradient(self, h: Tensor, b: Tensor, dy: Tensor) -> Tensor:
        """The gradient of b, from that of ``up(h, b)``."""

    def down_factor_gradient(self, x: Tensor, a: Tensor, dh: Tensor) -> Tensor:
        """The gradient of a, from that of ``down(x, a)``."""


def effective_kernel(
    product: Product, kernel: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """W + s A B. The only place of the formula; merging uses it, too."""
    # The scale is applied to the smaller factor instead of the whole kernel.
    return kernel + product.update(scale * a, b)


def hadamard_kernel(
    product: Product,
    kernel: Tensor,
    one: tuple[Tensor, Tensor],
    two: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """W + s (A B) * (A2 B2), elementwise: the kernel of LoHa, from (A, B) and (A2, B2)."""
    (a, b), (a2, b2) = one, two
    return kernel + product.update(scale * a, b) * product.update(a2, b2)


def factored(
    product: Product,
    x: Tensor,
    branch: Tensor,
    kernel: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """x W + s (x' A) B with x' = ``branch``, which is x or its dropout."""
    return product.apply(x, kernel) + product.up(product.down(branch, scale * a), b)


def effective(
    product: Product, x: Tensor, kernel: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x (W + s A B)."""
    return product.apply(x, effective_kernel(product, kernel, a, b, scale))


def effective_narrow(
    backend: Backend,
    product: Product,
    x: Tensor,
    kernel: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    train_a: bool = True,
) -> Tensor:
    """x (W + s A B); with h = s x A the gradients are

    dx = dy (W + s A B)^T,  dA = s x^T (dy B^T),  dB = h^T dy,  and none for W.

    With ``train_a=False`` there is none for A, and h is kept for the gradient of B, not x
    (LoRA-FA). In forward mode the derivative is that of ``effective``:

    y' = x' (W + s A B) + s (x A') B + s (x A) B'.
    """
    if backend.prefers_plain_gradients():
        return effective(product, x, kernel, a, b, scale)

    def forward(x: Tensor, kernel: Tensor, a: Tensor, b: Tensor) -> Any:
        kept = None if train_a else product.plain_down(x, scale * a)
        adapted = effective_kernel(product, kernel, a, b, scale)
        y, input_gradient = product.apply_with_gradient(x, adapted)

        def grad(dy: Tensor) -> tuple[Tensor | None, ...]:
            dx, da = input_gradient(dy), None
            h = product.plain_down(x, scale * a) if kept is None else kept
            if train_a:
                dh = product.up_input_gradient(b, dy)
                da = scale * product.down_factor_gradient(x, a, dh)
            return dx, None, da, product.up_factor_gradient(h, b, dy)

        return y, grad

    def tangent(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> list[Tensor]:
        x, kernel, a, b = primals
        dx, _, da, db = tangents

        def through_input(kernel: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return product.apply(dx, effective_kernel(product, kernel, a, b, scale))

        def through_b(x: Tensor, a: Tensor) -> Tensor:
            return product.up(product.down(x, scale * a), db)

        # Computed again in the backward pass, so that no copy of a kernel is kept until then.
        terms = [] if dx is None else [backend.recomputed(through_input, kernel, a, b)]
        if da is not None:
            terms.append(product.up(product.down(x, scale * da), b))
        if db is not None:
            kept = not train_a
            terms.append(through_b(x, a) if kept else backend.recomputed(through_b, x, a))
        return terms

    return backend.custom_gradient(forward, x, kernel, a, b, tangent=tangent)


def leading_shape(backend: Backend, x: Tensor) -> list[Any]:
    """The sizes of all axes but the last, for ``reshape``: static where they are known, and -1
    for a single one that is not."""
    sizes = list(x.shape[:-1])
    if None not in sizes:
        return sizes
    if sizes.count(None) == 1 and 0 not in sizes:
        return [-1 if size is None else size for size in sizes]
    dynamic = backend.ops.shape(x)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(sizes)]
