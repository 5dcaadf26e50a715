"""Functions of TensorFlow for inference: compiled for batches of any size, and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record


def is_recording() -> bool:
    """Whether a tape or a ForwardAccumulator records.

    None does in ``predict``, ``evaluate`` and exports. Without custom gradients their graphs
    have half of the operations.
    """
    result: bool = record.could_possibly_record()
    return result


def after(x: tf.Tensor) -> contextlib.AbstractContextManager[Any]:
    """See ``Backend.after``."""
    result: contextlib.AbstractContextManager[Any] = tf.control_dependencies([x])
    return result


def compiled_for_any_batch(
    function: Callable[..., Any], autograph: bool
) -> Callable[..., np.ndarray]:
    """A function of arrays, traced once for each combination of dtypes and sizes but the first.

    Args:
        function: A function of tensors that returns a tensor.
        autograph: Whether conditions and loops over tensors are converted.
    """
    traced = tf.function(function, autograph=autograph)
    concrete: dict[Any, Any] = {}

    def call(*arrays: np.ndarray) -> np.ndarray:
        key = tuple((x.dtype.name, x.shape[1:]) for x in arrays)
        if key not in concrete:
            specs = [tf.TensorSpec((None, *x.shape[1:]), x.dtype) for x in arrays]
            concrete[key] = traced.get_concrete_function(*specs)
        result: np.ndarray = concrete[key](*map(tf.constant, arrays)).numpy()
        return result

    return call


def write_rows(table: tf.Variable, first: int, values: np.ndarray) -> None:
    """Assign values to consecutive rows of a variable.

    Assigning to a slice of the variable would read it first, and copy all of it therefore.
    """
    rows = np.arange(first, first + len(values), dtype="int32")
    tf.raw_ops.ResourceScatterUpdate(resource=table.handle, indices=rows, updates=values)
