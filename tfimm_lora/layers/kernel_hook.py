"""The kernel attribute of an adapted layer, which shows the effective kernel in a call.

A subclass with a ``call`` of its own (a convolution that standardises its kernel, a
user's dense layer) reads ``self.kernel`` and does with it what it likes. While such a call
runs, the attribute gives W + s A B instead of the variable W, so that the layer computes
what it would compute after merging. Outside calls, and in other threads, it is the variable.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

_calls = threading.local()


class Frame:
    """One running call of one layer: what its kernel attribute shows."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._replacement: Any = None
        #: W + s A B, once somebody has asked for the kernel.
        self.effective: Any = None
        #: Whether the layer's own product was handed ``effective`` itself.
        self.reached_product = False

    def read(self) -> Any:
        """The kernel that the running call sees."""
        if self._replacement is not None:
            return self._replacement
        if self.effective is None:
            self.effective = self._make()
        return self.effective

    def write(self, value: Any) -> None:
        """The running call assigns to the kernel attribute, as tfimm's StdConv2D does."""
        self._replacement = None if value is self.effective else value


class KernelSlot:
    """Descriptor for the attribute in which Keras keeps the kernel variable."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            return self
        frame = current_frame(layer)
        if frame is not None:
            return frame.read()
        try:
            return layer.__dict__[self.attribute]
        except KeyError:
            raise AttributeError(
                f"Layer '{layer.name}' has no {self.attribute} yet: it is not built."
            ) from None

    def __set__(self, layer: Any, value: Any) -> None:
        frame = current_frame(layer)
        if frame is not None:
            frame.write(value)
        else:
            layer.__dict__[self.attribute] = value

    def __delete__(self, layer: Any) -> None:
        layer.__dict__.pop(self.attribute, None)


def current_frame(layer: Any) -> Frame | None:
    """The call of ``layer`` that runs in this thread, if any."""
    return getattr(_calls, "frames", {}).get(id(layer))


@contextlib.contextmanager
def kernel_shown_as(layer: Any, make: Callable[[], Any]) -> Iterator[Frame]:
    """Within this block the kernel attribute of ``layer`` shows what ``make`` gives."""
    if not hasattr(_calls, "frames"):
        _calls.frames = {}
    frames = _calls.frames
    outer = frames.get(id(layer))
    frame = frames[id(layer)] = Frame(make)
    try:
        yield frame
    finally:
        if outer is None:
            del frames[id(layer)]
        else:
            frames[id(layer)] = outer
