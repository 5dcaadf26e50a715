"""The update of a kernel: what each kind of layer computes, and in which form.

A layer's product is linear in its input x and in its kernel W. A ``Product`` says how to
form it, and how its update ``A B`` splits it in two narrow ones, h = x A and h B.
``adapted`` turns any ``Product`` into the output of an adapted layer, with s = alpha / rank,
in the form that it is given (``forms`` chooses):

* ``effective``: one product with ``W + s A B``, which is kept for the backward pass.
* ``factored``: ``x W + s (x A) B``, and the same way back.

The gradients of A and B go through the narrow products or through that of the whole kernel.
Two more are plain expressions, differentiated as they stand:

* ``dropped``: ``x W + s (drop(x) A) B``, with dropout on the branch.
* ``doubled``: ``x W + drop(x) (s A B)``, where the product cannot be split.

Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from typing import Any, Protocol

from tfimm_lora.layers.forms import Form


class Product(Protocol):
    """A product that is linear in x and in the kernel, and how A and B enter it."""

    def apply(self, x: Any, kernel: Any) -> Any:
        """The layer's product, before bias and activation."""

    def apply_and_back(self, x: Any, kernel: Any) -> tuple[Any, Any]:
        """``apply``, and what gives the gradient by x from that by the product."""

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        """The gradient by the kernel of ``apply``."""

    def update(self, a: Any, b: Any) -> Any:
        """A B, in the shape of the kernel."""

    def update_gradients(self, a: Any, b: Any, dw: Any) -> tuple[Any, Any]:
        """The gradients by a and b of ``update``."""

    def down(self, x: Any, a: Any) -> Any:
        """h = x A: the narrow half, with the rank as the number of its channels."""

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        """The gradient by x of ``down``."""

    def down_factor_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        """The gradient by a of ``down``."""

    def up(self, h: Any, b: Any) -> Any:
        """h B: back to the shape of the output."""

    def up_input_gradient(self, b: Any, dy: Any) -> Any:
        """The gradient by h of ``up``."""

    def up_factor_gradient(self, h: Any, b: Any, dy: Any) -> Any:
        """The gradient by b of ``up``."""


def effective_kernel(product: Product, kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """W + s A B. The one place of the formula; merging uses it too."""
    # The scale goes into the smaller factor, not over the whole kernel.
    return kernel + product.update(scale * a, b)


def adapted(
    backend: Any,
    product: Product,
    x: Any,
    kernel: Any,
    a: Any,
    b: Any,
    scale: float,
    form: Form,
    train_a: bool = True,
) -> Any:
    """The product with W + s A B; gradients to x, A and B, none to W.

    Without ``train_a`` none to A either, and what is kept for B's is h and not x (LoRA-FA).
    """
    factored = form.product == "factored"
    whole = form.gradients == "whole" and train_a

    def forward(x: Any, kernel: Any, a: Any, b: Any) -> Any:
        kept = product.down(x, scale * a) if factored or not train_a else None
        if factored:
            y, back = product.apply_and_back(x, kernel)
            y = y + product.up(kept, b)
        else:
            together = effective_kernel(product, kernel, a, b, scale)
            y, back = product.apply_and_back(x, together)

        def grad(dy: Any) -> tuple[Any, ...]:
            dx, scaled = back(dy), scale * a
            dh = product.up_input_gradient(b, dy) if factored or not whole else None
            if factored:
                dx = dx + product.down_input_gradient(x, scaled, dh)
            if whole:
                dw = product.kernel_gradient(x, kernel, dy)
                da, db = product.update_gradients(scaled, b, dw)
                return dx, None, scale * da, db
            h = product.down(x, scaled) if kept is None else kept
            da = scale * product.down_factor_gradient(x, a, dh) if train_a else None
            return dx, None, da, product.up_factor_gradient(h, b, dy)

        return y, grad

    return backend.custom_gradient(forward, x, kernel, a, b)


def dropped(
    product: Product, x: Any, branch: Any, kernel: Any, a: Any, b: Any, scale: float
) -> Any:
    """x W + s (drop(x) A) B, given drop(x)."""
    return product.apply(x, kernel) + product.up(product.down(branch, scale * a), b)


def doubled(product: Product, x: Any, branch: Any, kernel: Any, update: Any) -> Any:
    """x W + drop(x) (s A B), given drop(x) and the scaled update."""
    return product.apply(x, kernel) + product.apply(branch, update)


def leading_shape(dynamic: Any, static: Any) -> list[Any]:
    """All axes but the last, static where they are known."""
    return [dynamic[axis] if size is None else size for axis, size in enumerate(static[:-1])]
