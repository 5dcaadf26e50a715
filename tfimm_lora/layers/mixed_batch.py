"""Several adapters at once: which example of a batch goes through which.

A layer keeps the factors of all attached adapters side by side, A: (in, r_1 + r_2 + ...) and
B: (r_1 + r_2 + ..., out). Between the two, every example is let through the columns of its own
adapter only:

    y = x W + ((x A) * mask[example]) B

one narrow product in, one out, however many adapters there are. The scales are in B.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

_state = threading.local()

#: Where a layer keeps its ``Attached``, and a model the names of attached adapters.
_ATTACHED, ATTACHED_NAMES = "_lora_attached", "_lora_attached_names"


class Attached(NamedTuple):
    """What a layer knows of the attached adapters."""

    #: The names of the adapters; a column belongs to one by its index.
    names: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    #: For each column the adapter that it belongs to.
    members: np.ndarray


class Route:
    """Which adapter each example of a batch takes, while a model runs.

    Args:
        names: A name or None for each example; or None where ``ids`` are given.
        ids: An integer tensor (batch,): the index of the adapter, -1 for none.
    """

    def __init__(self, names: Sequence[str | None] | None, ids: Any = None) -> None:
        self.names = names
        self._ids = ids
        #: The layers that went by it, by id.
        self.used: set[int] = set()

    @property
    def batch(self) -> int | None:
        """The number of examples, where it is known."""
        return len(self.names) if self.names is not None else self._ids.shape[0]

    def ids(self, known: Sequence[str]) -> Any:
        """The indices of the examples' adapters among those that a model knows."""
        if self.names is None:
            return self._ids
        unknown = sorted({n for n in self.names if n is not None and n not in known})
        if unknown:
            raise ValueError(
                f"Received the adapters {unknown} in use_adapters, which are not attached; "
                f"expected None or one of {list(known)}."
            )
        order = {name: i for i, name in enumerate(known)}
        return np.array([-1 if n is None else order[n] for n in self.names], "int32")


def current() -> Route | None:
    """The route of the running block, if any, in this thread."""
    return getattr(_state, "route", None)


@contextlib.contextmanager
def along(route: Route | None) -> Iterator[Route | None]:
    """Within this block models go by ``route``."""
    outer = current()
    _state.route = route
    try:
        yield route
    finally:
        _state.route = outer


def attached_to(layer: Any) -> Attached:
    """What is attached to a layer.

    Raises:
        ValueError: if nothing is.
    """
    attached = layer.__dict__.get(_ATTACHED)
    if attached is None:
        raise ValueError(
            f"Received adapters to choose from in a model to whose layer '{layer.name}' none "
            "are attached. Call attach_adapters first."
        )
    return attached


def attach(layer: Any, attached: Attached) -> None:
    """Attach adapters to a layer."""
    layer.__dict__[_ATTACHED] = attached


def detach(layer: Any) -> bool:
    """Drop what is attached to a layer or a model, and say whether something was."""
    if layer.__dict__.pop(ATTACHED_NAMES, None) is not None:
        layer.__dict__.pop("call", None)
        return True
    return layer.__dict__.pop(_ATTACHED, None) is not None


def routed(
    layer: Any, backend: Any, product: Any, x: Any, kernel: Any, dtype: str, route: Route
) -> Any:
    """x W + ((x A) * mask) B for the adapters that are attached to a layer."""
    route.used.add(id(layer))
    outputs = product.apply(x, backend.ops.cast(kernel, dtype))
    attached = attached_to(layer)
    route.ids(attached.names)  # also where no adapter has this layer: names are checked
    if not len(attached.members):
        return outputs
    a, b = (backend.ops.cast(factor, dtype) for factor in (attached.a, attached.b))
    narrow = product.down(x, a)
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    return outputs + product.up(masked(backend, narrow, attached, route, channels_first), b)


def masked(
    backend: Any, narrow: Any, attached: Attached, route: Route, channels_first: bool = False
) -> Any:
    """The narrow tensor with the columns of other adapters set to zero.

    Its first axis is the batch, or the batch times something (windows, positions), with
    what belongs to one example side by side.
    """
    ops = backend.ops
    ids = ops.cast(route.ids(attached.names), "int32")
    mask = ops.cast(ops.equal(ids[:, None], attached.members[None, :]), narrow.dtype)
    rows, batch = narrow.shape[0], route.batch
    if rows is not None and batch is not None and rows % batch:
        raise ValueError(
            f"Received adapters for {batch} examples, but layer inputs of {rows} rows, which "
            "are not so many examples."
        )
    between = (1,) * (len(narrow.shape) - 2)
    columns = len(attached.members)
    shape = (columns, *between) if channels_first else (*between, columns)
    # (batch, 1, columns) times (batch, rows of an example, columns).
    grouped = ops.reshape(narrow, (ops.shape(ids)[0], -1, *_tail(ops, narrow)))
    return ops.reshape(grouped * ops.reshape(mask, (-1, 1, *shape)), ops.shape(narrow))


def _tail(ops: Any, tensor: Any) -> list[Any]:
    dynamic = ops.shape(tensor)
    return [dynamic[i + 1] if size is None else size for i, size in enumerate(tensor.shape[1:])]
