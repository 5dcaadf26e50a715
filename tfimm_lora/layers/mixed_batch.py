"""Mixed batches: each example of a batch uses an adapter of its own.

While a model runs within ``using``, its adapted layers take their values from a source instead
of their own variables. ``mixed_product`` computes with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from tfimm_lora.backend.interface import Layer, Tensor


class RowValues(NamedTuple):
    """What the adapters of the examples are for one layer, with the examples as first axis.

    Without that axis if all examples use one adapter. None stands for what no adapter has.
    """

    #: A and B, with the scale and DoRA's factor in B.
    a: Tensor | None = None
    b: Tensor | None = None
    #: DoRA's factor, a value for each output.
    gain: Tensor | None = None
    #: What is added to the outputs, a value for each. With ``kernel`` it is the whole bias.
    shift: Tensor | None = None
    #: The kernel of a fully trained classifier, which replaces that of the layer.
    kernel: Tensor | None = None


#: A function of outputs, a normalization.
Normalize = Callable[[Tensor], Tensor]
#: From a normalization, y -> factor y + offset for each channel, and its factor to the
#: normalization of outputs.
Fold = Callable[[Tensor, Normalize], Tensor]


class Source(Protocol):
    """Where the layers of a running model get the adapters of the examples from."""

    #: Whether all examples use one adapter.
    uniform: bool
    #: The id of a tensor -> the tensor, the output of a product, and how to fold into that
    #: product a normalization that follows.
    foldable: dict[int, tuple[Tensor, Fold]]

    def values(self, layer: Layer) -> RowValues | None:
        """The values for a layer, or None if no adapter changes it."""


_current: ContextVar[Source | None] = ContextVar("source", default=None)


def current() -> Source | None:
    """The source of the enclosing ``using`` block in this thread, if any."""
    return _current.get()


def values_for(layer: Layer) -> RowValues | None:
    """The values for a layer from the current source; None outside of ``using``."""
    source = _current.get()
    return None if source is None else source.values(layer)


def note_foldable(outputs: Tensor, fold: Fold) -> None:
    """Record how to fold a normalization into the product that computed outputs."""
    source = _current.get()
    if source is not None:
        source.foldable[id(outputs)] = outputs, fold


def fold_of(outputs: Tensor) -> Fold | None:
    """How to fold a normalization into the product that computed outputs, or None."""
    source = _current.get()
    found = None if source is None else source.foldable.get(id(outputs))
    return None if found is None else found[1]


@contextlib.contextmanager
def using(source: Source | None) -> Iterator[None]:
    """Within this block adapted layers take their values from ``source``; None means from
    their own variables."""
    token = _current.set(source)
    try:
        yield
    finally:
        _current.reset(token)


def require_none(layer: Layer, why: str) -> None:
    """Raise if a source has values for a layer, which cannot use them.

    Args:
        layer: The layer.
        why: The reason.
    """
    if values_for(layer) is not None:
        raise ValueError(
            f"Layer '{layer.name}' cannot use an adapter for each example: {why}. Leave it out "
            "of the targets of the bank."
        )
