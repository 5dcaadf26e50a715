"""Frozen layers and activations that are compiled in training, and how to leave it to Keras."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.validation import check_bool

_uses_compiled_layers: ContextVar[bool] = ContextVar("compiled", default=True)


def compiled_call(backend: Backend, layer: Layer, call: Any, x: Tensor) -> Tensor | None:
    """The output for x of a frozen layer with this ``call``, or None if it is not compiled."""
    return backend.compiled_call(layer, call, x) if _uses_compiled_layers.get() else None


def activated(backend: Backend, activation: Any, x: Tensor) -> Tensor:
    """The activation of the output of an adapted layer; None is the identity."""
    if activation is None:
        return x
    if _uses_compiled_layers.get() and not backend.prefers_plain_gradients():
        compiled = backend.compiled_activation(activation, x)
        if compiled is not None:
            return compiled
    return activation(x)


@contextlib.contextmanager
def use_compiled_layers(enabled: bool) -> Iterator[None]:
    """Choose whether frozen layers are compiled within this block.

    On TensorFlow (legacy Keras or Keras 3) and CPUs, training computes frozen layer
    normalizations, GELU and SiLU (also as the activation of an adapted Dense layer) as one
    operation each, forward and backward, which XLA compiles for each shape of at least 4,096
    numbers per example. They are computed in float32 and agree with those of Keras up to
    rounding. ``predict``, ``evaluate`` and exports use the operations of Keras. A function that
    was traced before stays as it is: compile the model again within the block.

    It changes nothing on JAX, where ``fit`` compiles the whole step, nor on torch, which has
    such operations itself.

    Args:
        enabled: Whether to compile them. Default outside of such a block: True.

    Raises:
        TypeError: if ``enabled`` is not a bool.

    Example:
        >>> import tfimm_lora as lora
        >>> with lora.use_compiled_layers(False):
        ...     pass  # model.compile(...), model.fit(...)
    """
    check_bool(enabled, "enabled")
    token = _uses_compiled_layers.set(enabled)
    try:
        yield
    finally:
        _uses_compiled_layers.reset(token)
