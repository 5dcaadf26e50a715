"""Choose the fastest form of an adapted product.

``products`` computes x (W + s A B) and its gradients in three forms, which differ only in
rounding, time and memory. Let a layer map N places of its input (input rows of a dense layer,
positions of a convolution), each of W numbers, to M units, with rank r.

*Forward pass and gradient of the input.* The effective forms add s A B to the kernel and
multiply once; the factored form multiplies with the kernel and with A and B separately. What
each adds to the plain product is limited by memory bandwidth, so the estimate counts the
numbers that are read or written:

    effective: 8 W M            A B is written, read, and added to the kernel, which is read and
                                written; keeping it for the backward pass counts the same again
    factored:  N (2 W + 3 C + 4 M)  x is read for x A; (x A) B is written, read and added to y;
                                and the same for the gradient of x, with C numbers per place

In 16-bit arithmetic the form is always factored, because W + s A B loses small updates.

*Gradients of A and B in the effective forms.* "narrow": from x A and dy B^T, which read x and
dy twice each. "whole": the gradient of the kernel is computed first, reading x and dy once
each, and the gradients of A and B are computed from it. Narrow products are limited by memory
bandwidth, too, as if the rank were larger by about 12, so "whole" is faster for kernels that
are only slightly larger than their factors: W M < (24 + 2 r) (W + M), for example 64 inputs
and 64 units at rank 8.

The constants were fitted to TensorFlow on two cores; see the page on performance in the docs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

#: Estimates for sizes that are unknown when a layer is traced.
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
        gradients: "narrow" or "whole"; always "narrow" for the factored product.
    """

    product: str
    gradients: str


@dataclass(frozen=True)
class Work:
    """The sizes of an adapted product.

    Attributes:
        places: N, the number of input rows or positions.
        window: W, the number of inputs of each output.
        channels: C, the number of channels of the input.
        units: M, the number of outputs per place.
        rank: r.
    """

    places: int
    window: int
    channels: int
    units: int
    rank: int


def places(batch: int | None, positions: Sequence[int | None]) -> int:
    """Return N for a batch size and the positions in each direction; None means unknown."""
    known = math.prod(size for size in positions if size is not None)
    return (batch or UNKNOWN_BATCH) * (known if None not in positions else UNKNOWN_POSITIONS)


def choose(work: Work, narrow: bool) -> Form:
    """Return the form for a product; ``narrow`` is whether it is in 16-bit arithmetic."""
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


def is_kernel_per_example(work: Work) -> bool:
    """Whether a mixed batch is faster with a kernel W + A_i B_i for each example.

    Both forms are limited by memory bandwidth. With a kernel for each example W M numbers are
    written and read, at a cost that grows with the rank; the factored form reads C numbers at
    each place, and writes, reads and adds M.

    Args:
        work: The sizes of the product, with the places of one example.
    """
    places = work.places * (work.channels + 3 * work.units)
    return places > work.window * work.units * (12 + work.rank)


@contextlib.contextmanager
def use_form(product: str | None = None, gradients: str | None = None) -> Iterator[None]:
    """Choose the form in which adapted layers are computed within this block.

    All forms compute the same result up to rounding. By default each layer uses the form that
    is estimated to be the fastest for its sizes; measure to find a better one. A function that
    was traced before keeps its form (``fit`` and ``predict`` trace theirs once): compile the
    model again within the block. Layers with dropout, and layers with their own ``call``, have
    only one form.

    Args:
        product: "effective", one product with W + s A B, or "factored", x W + s (x A) B.
            None (default) chooses by size. In 16-bit arithmetic "effective" loses small
            updates.
        gradients: "narrow" computes the gradients of A and B from narrow products; "whole"
            computes them from the gradient of the whole kernel, and implies the effective
            product. None (default) chooses by size.

    Raises:
        ValueError: If a name is unknown, or if "factored" is combined with "whole", which is
            never faster.

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
            "or None: the factored product never computes the gradient of the whole kernel."
        )
    token = _requested.set(wanted)
    try:
        yield
    finally:
        _requested.reset(token)
