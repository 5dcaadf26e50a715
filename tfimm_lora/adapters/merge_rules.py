"""Pruned and sign-elected weighted sums of arrays: TIES, DARE and magnitude pruning.

Functions of NumPy arrays, independent of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: How TIES elects the sign of an entry: by the sum of the values or by counting them.
MAJORITY_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Rule:
    """How arrays are mixed.

    Attributes:
        prune: The entries of each array to keep: all (None), the "largest" or "random" ones.
        elect: Whether to elect the sign of each entry and average the values of this sign.
            Otherwise all values are summed.
    """

    prune: str | None = None
    elect: bool = False


#: The rules by PEFT's names.
RULES = {
    "linear": Rule(),
    "ties": Rule("largest", elect=True),
    "dare_linear": Rule("random"),
    "dare_ties": Rule("random", elect=True),
    "magnitude_prune": Rule("largest"),
}


def mix(
    arrays: Sequence[np.ndarray],
    weights: Sequence[float],
    rule: Rule,
    density: float | None = None,
    majority_sign_method: str = "total",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Prune each array, then sum them with weights, or elect signs and average.

    A negative weight is the same as the negated array with the positive weight. (PEFT differs
    where signs are elected: there the array votes with its sign before the negation.)

    Args:
        arrays: Arrays of the same shape.
        weights: One weight for each array.
        rule: How to prune, and whether to elect signs.
        density: The fraction of entries to keep, in (0, 1]; for rules that prune.
        majority_sign_method: "total" or "frequency"; for rules that elect signs.
        rng: The source of random numbers; for rules that prune at random.

    Returns:
        An array of the same shape, in float64.

    Example:
        >>> import numpy as np
        >>> one, two = np.array([3.0, -1.0, 2.0]), np.array([1.0, 4.0, -5.0])
        >>> mix([one, two], [1, 1], RULES["ties"], density=1.0)
        array([ 2.,  4., -5.])
    """
    pruned, sizes = [], [abs(w) for w in weights]
    for array, w in zip(arrays, weights):
        signed: np.ndarray = array.astype("float64") * (-1.0 if w < 0 else 1.0)
        pruned.append(_prune(signed, rule.prune, density, rng))
    if not rule.elect:
        return sum((w * array for w, array in zip(sizes, pruned)), np.zeros(arrays[0].shape))
    elected = majority_sign(pruned, majority_sign_method)
    total, count = np.zeros(elected.shape), np.zeros(elected.shape)
    for w, array in zip(sizes, pruned):
        agrees = np.sign(array) == elected
        total += np.where(agrees, w * array, 0.0)
        count += agrees
    return total / np.maximum(count, 1)


def keep_largest(array: np.ndarray, density: float) -> np.ndarray:
    """Set all entries but the ``density * size`` ones of largest magnitude to 0.

    This number is rounded down, as in PEFT, but is at least 1.

    Example:
        >>> import numpy as np
        >>> keep_largest(np.array([1.0, -3.0, 2.0, 0.5]), 0.5)
        array([ 0., -3.,  2.,  0.])
    """
    count = max(1, int(density * array.size))
    if count >= array.size:
        result: np.ndarray = array.copy()
        return result
    flat = array.reshape(-1)
    chosen = np.argpartition(np.abs(flat), -count)[-count:]
    kept: np.ndarray = np.zeros(flat.shape, flat.dtype)
    kept[chosen] = flat[chosen]
    reshaped: np.ndarray = kept.reshape(array.shape)
    return reshaped


def keep_random(array: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """Keep each entry with probability ``density``, divided by it; else set it to 0.

    The expected value is the array.
    """
    return np.where(rng.random(array.shape) < density, array / density, 0.0)


def majority_sign(arrays: Sequence[np.ndarray], method: str = "total") -> np.ndarray:
    """Elect a sign for each entry: that of the sum of values ("total") or of signs.

    Returns:
        An array of 1 and -1.

    Example:
        >>> import numpy as np
        >>> arrays = [np.array([1.0]), np.array([1.0]), np.array([-5.0])]
        >>> majority_sign(arrays, "total"), majority_sign(arrays, "frequency")
        (array([-1.]), array([1.]))
    """
    votes = [np.sign(a) if method == "frequency" else a for a in arrays]
    return np.where(sum(votes) >= 0, 1.0, -1.0)


def _prune(
    array: np.ndarray, which: str | None, density: float | None, rng: np.random.Generator | None
) -> np.ndarray:
    if which is None or density is None or density >= 1:
        return array
    if which == "largest":
        return keep_largest(array, density)
    assert rng is not None
    return keep_random(array, density, rng)
