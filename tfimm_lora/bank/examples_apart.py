"""Check that a model keeps the examples of a batch apart.

A layer gives the first rows of its input to the first example, the next ones to the second, and
so on. That is wrong where a model puts something else before the batch (positions, windows), or
computes something once for all examples, and shapes do not show it. So the function of a mixed
batch is run twice. The second time the first example has other inputs and another adapter, and
nothing but its own outputs may differ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: The examples of the check. A power of two, for which JAX compiles the function anyway.
_COUNT = 4

#: How much outputs of each dtype may differ by rounding, relative to the largest. They are
#: those of one function on inputs of one shape, so hardly any differences are expected.
_TOLERANCE = {"float32": 3e-6, "float16": 2e-2, "bfloat16": 1e-1}


def made_up_inputs(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Inputs (examples, *shape) between 0 and 1, which are pictures and ids for any model."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iub":
        return rng.integers(0, 2, (_COUNT, *shape)).astype(dtype)
    return rng.random((_COUNT, *shape)).astype(dtype)


def require_examples_apart(
    name: str,
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    shape: tuple[int, ...],
    dtype: str,
    probe: int,
) -> None:
    """Raise a ValueError if an example has an effect on others in a mixed batch.

    Args:
        name: The name of the model.
        function: The function of a mixed batch, of inputs and slots.
        shape: The shape of the inputs of one example.
        dtype: The dtype of the inputs.
        probe: The slot of an adapter that changes every layer. Slot 0 has none.
    """
    inputs, slots = made_up_inputs(shape, dtype), np.zeros(_COUNT, "int32")
    before = function(inputs, slots)
    inputs[0] = made_up_inputs(shape, dtype, seed=1)[0]
    slots[0] = probe
    after = function(inputs, slots)
    if before.shape != after.shape or before.shape[:1] != (_COUNT,):
        raise ValueError(
            f"Model '{name}' returns outputs of shape {before.shape} for {_COUNT} examples; "
            "expected a model whose outputs have the batch as their first axis."
        )
    if not _same(before[1:], after[1:]):
        raise ValueError(
            f"Model '{name}' cannot use an adapter for each example: that of one has an effect "
            "on the outputs of others. A layer with an adapter mixes the examples of a batch, "
            "has an input whose first axis is not the batch, or has one input for all "
            "examples. Leave that layer out of the targets of the bank."
        )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether outputs are the same up to rounding."""
    tolerance = _TOLERANCE.get(one.dtype.name, 1e-9)
    one, other = one.astype("float64"), other.astype("float64")
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return False
    size = np.abs(one[finite]).max(initial=0)
    difference = np.abs(one[finite] - other[finite]).max(initial=0)
    return bool(difference <= tolerance * size)
