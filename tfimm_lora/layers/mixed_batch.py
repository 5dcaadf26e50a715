"""Several adapters in one batch: each example uses its own.

A layer keeps the factors of all attached adapters side by side, A: (in, r_1 + r_2 + ...) and
B: (r_1 + r_2 + ..., out). Between the two, a mask keeps for every example only the columns of
its own adapter:

    y = x W + ((x A) * mask[example]) B

That is one narrow product in and one out, however many adapters there are. B includes the
scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.layers.products import Product


class Attached(NamedTuple):
    """The adapters that are attached to a layer."""

    #: The names of the adapters.
    names: tuple[str, ...]
    a: np.ndarray
    b: np.ndarray
    #: For each column of A the index of the adapter that it belongs to.
    members: np.ndarray


class Assignment:
    """Which adapter each example of a batch uses, while a model runs.

    Args:
        names: A name or None for each example; or None if ``ids`` are given.
        ids: An integer tensor (batch,): the index of the adapter, -1 for none.
    """

    def __init__(self, names: Sequence[str | None] | None, ids: Tensor = None) -> None:
        self.names = names
        self._ids = ids
        #: The ids of the layers that applied it.
        self.used: set[int] = set()

    @property
    def batch(self) -> int | None:
        """The number of examples, if it is known."""
        if self.names is not None:
            return len(self.names)
        size: int | None = self._ids.shape[0]
        return size

    def ids(self, known: Sequence[str]) -> Any:
        """The index of each example's adapter among those that a model has attached."""
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


_current: ContextVar[Assignment | None] = ContextVar("assignment", default=None)


def current() -> Assignment | None:
    """The assignment of the enclosing ``assigned`` block in this thread, if any."""
    return _current.get()


@contextlib.contextmanager
def assigned(assignment: Assignment | None) -> Iterator[Assignment | None]:
    """Within this block models use the adapters of ``assignment``."""
    token = _current.set(assignment)
    try:
        yield assignment
    finally:
        _current.reset(token)


def mixed(
    backend: Backend,
    product: Product,
    x: Tensor,
    kernel: Tensor,
    attached: Attached,
    assignment: Assignment,
    channels_first: bool,
) -> Tensor:
    """x W + ((x A) * mask) B for the adapters that are attached to a layer."""
    outputs = product.apply(x, kernel)
    assignment.ids(attached.names)  # checks the names, also if no adapter has this layer
    if not len(attached.members):
        return outputs
    dtype = backend.dtype_of(kernel)
    a, b = (backend.ops.cast(factor, dtype) for factor in (attached.a, attached.b))
    h = masked(backend, product.down(x, a), attached, assignment, channels_first)
    return outputs + product.up(h, b)


def masked(
    backend: Backend,
    h: Tensor,
    attached: Attached,
    assignment: Assignment,
    channels_first: bool = False,
) -> Tensor:
    """h = x A with the columns of other adapters set to zero.

    Its first axis is the batch, or the batch times something (windows, positions), with
    what belongs to one example side by side.
    """
    ops = backend.ops
    ids = ops.cast(assignment.ids(attached.names), "int32")
    mask = ops.cast(ops.equal(ids[:, None], attached.members[None, :]), h.dtype)
    rows, batch = h.shape[0], assignment.batch
    if rows is not None and batch is not None and rows % batch:
        raise ValueError(
            f"Received adapters for {batch} examples, but a layer whose input has {rows} rows, "
            f"which is not a multiple of {batch}. Pass one adapter per example of the batch."
        )
    between = (1,) * (len(h.shape) - 2)
    columns = len(attached.members)
    shape = (columns, *between) if channels_first else (*between, columns)
    # (batch, 1, columns) times (batch, rows of an example, columns).
    grouped = ops.reshape(h, (ops.shape(ids)[0], -1, *_trailing_sizes(backend, h)))
    return ops.reshape(grouped * ops.reshape(mask, (-1, 1, *shape)), ops.shape(h))


def require_applied(layer: Layer, name: str, assignment: Assignment, merged: bool) -> None:
    """Raise if adapters were chosen per example and a layer's call did not apply them.

    Args:
        layer: The layer, after its call.
        name: The name of its original class.
        assignment: The assignment of the running block.
        merged: Whether the layer is merged.
    """
    if id(layer) in assignment.used:
        return
    why = (
        "it is merged: call unmerge_lora_weights first"
        if merged
        else "its class has a call of its own, which does not support it"
    )
    raise ValueError(
        f"Layer '{layer.name}' ({name}) cannot use an adapter for each example; {why}."
    )


def require_none(layer: Layer) -> None:
    """Raise if adapters were chosen per example and another layer reads the kernel of one.

    Args:
        layer: The adapted layer, whose effective kernel would have to differ per example.
    """
    if current() is not None:
        raise ValueError(
            f"Layer '{layer.name}' cannot use an adapter for each example; another layer uses "
            "its kernel, too (as a head that is tied to an embedding does). Leave the layer "
            "out of lora_targets, or load one adapter at a time."
        )


def _trailing_sizes(backend: Backend, tensor: Tensor) -> list[Any]:
    dynamic = backend.ops.shape(tensor)
    return [dynamic[i + 1] if size is None else size for i, size in enumerate(tensor.shape[1:])]
