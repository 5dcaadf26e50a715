"""Which form of an adapted product is the cheapest: the one place where that is decided.

``update`` can compute x (W + s A B) and its gradients in several ways, which differ in nothing
but rounding, time and memory. Let a layer multiply N places of its input (rows of a dense
layer, positions of a convolution), each of W numbers, into M units, at rank r.

*Forward and input gradient.* The ``effective`` form adds s A B to the kernel and multiplies
once; the ``factored`` form multiplies with the kernel and with A and B apart. What either has
beyond the plain product is bound by memory, so numbers that are read or written are counted:

    effective: 8 W M            A B written, read, added to a kernel that is read and written;
                                and kept for the backward pass, which counts as much again
    factored:  N (2 W + 3 C + 4 M)  x read for x A, (x A) B written, read, added to y; and the
                                same back to the input, whose places have C numbers each

In 16-bit arithmetic it is ``factored`` always: in W + s A B a small update is lost.

*Gradients of A and B.* ``narrow``, they go through x A and dy B^T, and pass over x and dy
twice each. ``whole``, the gradient of the kernel is formed first, with one pass over each, and
A and B take theirs from that. Narrow products are bound by memory too, as if the rank were some
12 larger than it is, so the whole gradient is cheaper for kernels that are hardly larger than
their factors: W M < (24 + 2 r) (W + M), for example 64 inputs and 64 units at rank 8.

The constants fit what TensorFlow takes on two cores (docs/performance.md).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: What a size that is not known when a layer is traced is taken for.
UNKNOWN_BATCH, UNKNOWN_POSITIONS = 8, 196

PRODUCTS = ("effective", "factored")
GRADIENTS = ("narrow", "whole")

_state = threading.local()


@dataclass(frozen=True)
class Form:
    """How an adapted product is computed.

    Attributes:
        product: "effective" or "factored".
        gradients: "narrow" or "whole".
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
    product = "factored" if narrow or through < 8 * kernel else "effective"
    whole = kernel < (24 + 2 * work.rank) * (work.window + work.units)
    wanted = getattr(_state, "wanted", (None, None))
    return Form(wanted[0] or product, wanted[1] or ("whole" if whole else "narrow"))


@contextlib.contextmanager
def use_form(product: str | None = None, gradients: str | None = None) -> Iterator[None]:
    """Within this block what is traced computes adapted layers in a form of your choice.

    All forms give the same but for rounding. By default each layer takes the one that should be
    the fastest for its sizes; where you know better, measure and choose. A function that was
    traced before (``fit`` and ``predict`` trace theirs once) keeps its form: compile the model
    again within the block. Layers with dropout and those with a call of their own have one
    form.

    Args:
        product: "effective", one product with W + s A B, or "factored", x W + s (x A) B.
            None (default) for what suits. In 16-bit arithmetic "effective" loses small updates.
        gradients: "narrow", those of A and B through the narrow products, or "whole", through
            the gradient of the whole kernel. None (default) for what suits.

    Raises:
        ValueError: for another word.

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
    outer = getattr(_state, "wanted", (None, None))
    _state.wanted = (product or outer[0], gradients or outer[1])
    try:
        yield
    finally:
        _state.wanted = outer
