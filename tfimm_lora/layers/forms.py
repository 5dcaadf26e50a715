"""Which form of an adapted product is the fastest: the only place where that is decided.

``products`` computes x (W + s A B) and its gradients in three forms, which differ only in
rounding, time and memory. Let a layer multiply N places of its input (rows of a dense layer,
positions of a convolution), each of W numbers, into M units, at rank r.

*Forward pass and gradient of the input.* The effective forms add s A B to the kernel and
multiply once; the factored form multiplies with the kernel and with A and B separately. What
each adds to the plain product is bound by memory, so the numbers that are read or written are
counted:

    effective: 8 W M            A B written, read, added to a kernel that is read and written;
                                kept for the backward pass, which counts as much again
    factored:  N (2 W + 3 C + 4 M)  x read for x A, (x A) B written, read, added to y; and the
                                same for the gradient of x, whose places have C numbers each

In 16-bit arithmetic it is always factored: in W + s A B a small update is lost.

*Gradients of A and B in the effective forms.* "narrow": through x A and dy B^T, which pass over
x and dy twice each. "whole": the gradient of the kernel is formed first, with one pass over
each, and those of A and B are taken from it. Narrow products are bound by memory too, as if
the rank were about 12 larger than it is, so "whole" is faster for kernels that are hardly
larger than their factors: W M < (24 + 2 r) (W + M), for example 64 inputs and 64 units at
rank 8.

The constants were fitted to TensorFlow on two cores; see the page on performance in the docs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

#: Stand-ins for sizes that are not known when a layer is traced.
UNKNOWN_BATCH, UNKNOWN_POSITIONS = 8, 196

PRODUCTS = ("effective", "factored")
GRADIENTS = ("narrow", "whole")

#: The product and the gradients that ``use_form`` asks for.
_requested: ContextVar[tuple[str | None, str | None]] = ContextVar(
    "requested", default=(None, None)
)


@dataclass(frozen=True)
class Form:
    """How an adapted product is computed.

    Attributes:
        product: "effective" or "factored".
        gradients: "narrow" or "whole"; those of the factored product are narrow.
    """

    product: str
    gradients: str


@dataclass(frozen=True)
class Work:
    """The sizes of an adapted product.

    Attributes:
        places: N, how many rows or positions there are.
        window: W, how many numbers are multiplied into one output.
        channels: C, how many numbers a place of the input has.
        units: M, how many outputs a place has.
        rank: r.
    """

    places: int
    window: int
    channels: int
    units: int
    rank: int


def places(batch: int | None, positions: Sequence[int | None]) -> int:
    """N, of a batch with so many positions in each direction; None for what is unknown."""
    known = math.prod(size for size in positions if size is not None)
    return (batch or UNKNOWN_BATCH) * (known if None not in positions else UNKNOWN_POSITIONS)


def choose(work: Work, narrow: bool) -> Form:
    """The form for some work; ``narrow`` is whether it is in 16-bit arithmetic."""
    kernel = work.window * work.units
    through = work.places * (2 * work.window + 3 * work.channels + 4 * work.units)
    product, gradients = _requested.get()
    if product is None:
        by_size = "factored" if narrow or through < 8 * kernel else "effective"
        product = "effective" if gradients == "whole" else by_size
    if product == "factored":
        return Form("factored", "narrow")
    whole = kernel < (24 + 2 * work.rank) * (work.window + work.units)
    return Form("effective", gradients or ("whole" if whole else "narrow"))


@contextlib.contextmanager
def use_form(product: str | None = None, gradients: str | None = None) -> Iterator[None]:
    """Compute adapted layers in a form of your choice, within this block.

    All forms compute the same but for rounding. By default each layer takes the one that should
    be the fastest for its sizes; where you know better, measure and choose. A function that was
    traced before (``fit`` and ``predict`` trace theirs once) keeps its form: compile the model
    again within the block. Layers with dropout and those with a ``call`` of their own have only
    one form.

    Args:
        product: "effective", one product with W + s A B, or "factored", x W + s (x A) B.
            None (default) chooses by size. In 16-bit arithmetic "effective" loses small
            updates.
        gradients: "narrow", the gradients of A and B through the narrow products, or "whole",
            through the gradient of the whole kernel, which implies the effective product. None
            (default) chooses by size.

    Raises:
        ValueError: for an unknown name, or for "factored" with "whole", which is never faster.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRADense(10, lora_rank=4)
        >>> with lora.use_form("factored"):
        ...     layer(np.zeros((2, 7, 3), "float32")).shape
        TensorShape([2, 7, 10])

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """
    words = (("product", product, PRODUCTS), ("gradients", gradients, GRADIENTS))
    for name, given, known in words:
        if given is not None and given not in known:
            raise ValueError(
                f"Received {name}={given!r}; expected None, {known[0]!r} or {known[1]!r}."
            )
    outer = _requested.get()
    wanted = (product or outer[0], gradients or outer[1])
    if wanted == ("factored", "whole"):
        raise ValueError(
            "Received product='factored' with gradients='whole'; expected gradients='narrow' "
            "or None: the factored product never forms the gradient of the whole kernel."
        )
    token = _requested.set(wanted)
    try:
        yield
    finally:
        _requested.reset(token)
