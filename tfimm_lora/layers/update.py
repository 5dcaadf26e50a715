"""The update of a kernel: what each kind of layer computes, and in which form.

A layer's product is linear in its input x and in its kernel W. A ``Product`` says how to
form it, and how its update ``A B`` splits it in two narrow ones. The forms below turn any
``Product`` into the output of an adapted layer, with s = alpha / rank:

* ``effective``: one product with ``W + s A B``. Backward goes through the factors, so the
  gradient of the whole kernel is never formed.
* ``factored``: ``x W + s (x A) B``. For dropout on the branch, for 16-bit arithmetic (in
  which a small update would vanish in the rounding of W) and for few rows.
* ``doubled``: ``x W + drop(x) (s A B)``, where the product cannot be split.

Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from typing import Any, Protocol


class Product(Protocol):
    """A product that is linear in x and in the kernel, and how A and B enter it."""

    def apply(self, x: Any, kernel: Any) -> Any:
        """The layer's product, before bias and activation."""

    def update(self, a: Any, b: Any) -> Any:
        """A B, in the shape of the kernel."""

    def down(self, x: Any, a: Any) -> Any:
        """x A: the narrow half, with the rank as its last axis."""

    def up(self, h: Any, b: Any) -> Any:
        """h B: back to the shape of the output."""

    def input_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        """The gradient by x of ``apply``."""

    def factor_gradients(self, x: Any, a: Any, b: Any, dy: Any) -> tuple[Any, Any]:
        """The gradients by a and b of ``up(down(x, a), b)``."""


def effective_kernel(product: Product, kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """W + s A B. The one place of the formula; merging uses it too."""
    return kernel + scale * product.update(a, b)


def effective(
    seam: Any, product: Product, x: Any, kernel: Any, a: Any, b: Any, scale: float
) -> Any:
    """The product with W + s A B; gradients to x, A and B, none to W."""

    def forward(x: Any, kernel: Any, a: Any, b: Any) -> Any:
        y = product.apply(x, effective_kernel(product, kernel, a, b, scale))

        def grad(dy: Any) -> tuple[Any, ...]:
            # Formed again: keeping it from the forward pass would hold a second copy of
            # every kernel in memory.
            adapted = effective_kernel(product, kernel, a, b, scale)
            da, db = product.factor_gradients(x, a, b, dy)
            return product.input_gradient(x, adapted, dy), None, scale * da, scale * db

        return y, grad

    return seam.custom_gradient(forward, x, kernel, a, b)


def factored(
    product: Product, x: Any, dropped: Any, kernel: Any, a: Any, b: Any, scale: float
) -> Any:
    """x W + s (drop(x) A) B."""
    return product.apply(x, kernel) + scale * product.up(product.down(dropped, a), b)


def doubled(product: Product, x: Any, dropped: Any, kernel: Any, update: Any) -> Any:
    """x W + drop(x) (s A B), given the scaled update."""
    return product.apply(x, kernel) + product.apply(dropped, update)
