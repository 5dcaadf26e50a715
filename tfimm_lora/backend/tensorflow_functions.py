"""Compile functions with TensorFlow once for batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def compiled_for_any_batch(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A function of arrays, traced once for each combination of dtypes and sizes but the first.

    Args:
        function: A function of tensors that returns a tensor.
    """
    traced = tf.function(function, autograph=False)
    concrete: dict[Any, Any] = {}

    def call(*arrays: np.ndarray) -> np.ndarray:
        key = tuple((x.dtype.name, x.shape[1:]) for x in arrays)
        if key not in concrete:
            specs = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in arrays]
            concrete[key] = traced.get_concrete_function(*specs)
        result: np.ndarray = concrete[key](*map(tf.constant, arrays)).numpy()
        return result

    return call
