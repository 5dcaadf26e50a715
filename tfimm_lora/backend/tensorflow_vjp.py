"""The vector-Jacobian product of a function on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfimm_lora.backend.interface import Tensor


def vjp(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Any:
    """The gradient of ``sum(function(x) * dy)`` with respect to ``x``."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x)
        y = function(x)
    gradient = tape.gradient(y, x, dy)
    if gradient is not None:
        return gradient
    # While a ForwardAccumulator differentiates a custom gradient, tapes record nothing.
    in_graph = tf.function(lambda x, dy: tf.gradients(function(x), x, dy)[0])
    return in_graph(x, dy)
