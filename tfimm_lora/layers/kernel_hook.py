"""What the kernel attribute of an adapted layer shows while the layer is called.

A subclass with a ``call`` of its own (a convolution that standardises its kernel, a user's
dense layer) reads ``self.kernel`` and uses it as it likes. While such a call runs, the
attribute shows W + s A B instead of the variable W, so that the layer computes what it would
compute after merging. The same holds for other layers that read the attribute in their calls
(a head that is tied to an embedding). Outside of calls, and in other threads, it is the
variable.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from tfimm_lora.backend.interface import Layer
from tfimm_lora.layers import mixed_batch

#: The running call of each layer, by the id of the layer.
_calls: ContextVar[Mapping[int, RunningCall]] = ContextVar("calls", default={})  # noqa: B039


class RunningCall:
    """A running call of a layer: what its kernel attribute shows."""

    def __init__(self, kernel: Any) -> None:
        #: The kernel that the call is given.
        self.kernel = kernel
        #: Whether the call read the kernel attribute.
        self.read_kernel = False
        #: Whether the layer's own product was given ``kernel`` itself.
        self.reached_product = False
        self._replacement: Any = None

    def read(self) -> Any:
        """The value of the kernel attribute."""
        if self._replacement is not None:
            return self._replacement
        self.read_kernel = True
        return self.kernel

    def write(self, value: Any) -> None:
        """The call assigns to the kernel attribute, as tfimm's StdConv2D does."""
        self._replacement = None if value is self.kernel else value


class KernelHook:
    """Descriptor for the attribute in which Keras keeps the kernel variable."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, layer: Layer, owner: Any = None) -> Any:
        if layer is None:
            return self
        call = running_call(layer)
        if call is not None:
            return call.read()
        if layer._is_shown_to_others() and not _is_read_in_build():
            mixed_batch.require_none(
                layer,
                "another layer uses its kernel (as a head that is tied to an embedding does)",
            )
            return layer._shown_kernel()
        try:
            return layer.__dict__[self.attribute]
        except KeyError:
            raise AttributeError(
                f"Layer '{layer.name}' has no {self.attribute} yet: it is not built."
            ) from None

    def __set__(self, layer: Layer, value: Any) -> None:
        call = running_call(layer)
        if call is not None:
            call.write(value)
            return
        if "kernel_lora_a" in layer.__dict__ and value is not layer._kernel_variable:
            raise ValueError(
                f"Layer '{layer.name}' has LoRA, and something outside of it replaces its "
                f"kernel (the attribute {self.attribute!r}), so that an update of the kernel "
                "would be lost. Assign values with layer.kernel.assign(...). If a wrapper such "
                "as weight normalization does it, leave the layer out of lora_targets."
            )
        layer.__dict__[self.attribute] = value

    def __delete__(self, layer: Layer) -> None:
        layer.__dict__.pop(self.attribute, None)


def _is_read_in_build() -> bool:
    """Whether the attribute is read by the ``build`` of a layer around, which needs the
    variable. (Keras builds a layer within its first call.)"""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_name.removeprefix("tf__")  # of AutoGraph
        if name in ("build", "call"):
            return bool(name == "build")
        frame = frame.f_back
    return False


def running_call(layer: Layer) -> RunningCall | None:
    """The call of ``layer`` that is running in this thread, if any."""
    return _calls.get().get(id(layer))


@contextlib.contextmanager
def kernel_shown_as(layer: Layer, kernel: Any) -> Iterator[RunningCall]:
    """Within this block the kernel attribute of ``layer`` is ``kernel``."""
    call = RunningCall(kernel)
    token = _calls.set({**_calls.get(), id(layer): call})
    try:
        yield call
    finally:
        _calls.reset(token)
