"""The directions in which rows of numbers vary most, found batch by batch; NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.initializers.svd import row_signs

#: Up to this width the covariance is kept whole: 8 MB in float64, a second to decompose.
WHOLE_WIDTH = 1024

#: A variance below this part of the largest, or of the mean's square, is rounding.
_ROUNDING = 1e-12


class Directions(NamedTuple):
    """Directions of decreasing variance.

    Attributes:
        vectors: Orthonormal columns, of shape (width, k); the largest entry of each by
            magnitude is positive.
        ratios: For each its part of the whole variance, of shape (k,).
    """

    vectors: np.ndarray
    ratios: np.ndarray


class Spread:
    """The covariance of rows, whole: sum of (x - c)^T (x - c) and of x - c, about a fixed c.

    c is the mean of the rows that come first, so that little is lost where the mean is large.

    Args:
        width: The length of a row.

    Example:
        >>> spread = Spread(2)
        >>> spread.add(np.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> spread.add(np.array([[5.0, 5.0]]))
        >>> spread.directions(2)
        Directions(vectors=array([[1.],
               [0.]]), ratios=array([1.]))
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._about = np.zeros(width)
        self._sum = np.zeros(width)
        self._squares = 0.0
        self._products = self._start()

    def _start(self) -> np.ndarray:
        return np.zeros((self.width, self.width))

    def _product(self, rows: np.ndarray) -> np.ndarray:
        """What ``rows`` add to the covariance times n."""
        return rows.T @ rows

    def _decomposed(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, the largest first, and eigenvectors in columns."""
        values, vectors = np.linalg.eigh(products)
        return values[::-1], vectors[:, ::-1]

    def add(self, rows: np.ndarray) -> None:
        """Take rows of shape (n, width) into account."""
        if not len(rows):
            return
        rows = np.asarray(rows, dtype="float64")
        if not self.count:
            self._about = rows.mean(axis=0)
        rows = rows - self._about
        self.count += len(rows)
        self._sum += rows.sum(axis=0)
        self._squares += float(np.square(rows).sum())
        self._products += self._product(rows)

    def directions(self, count: int) -> Directions:
        """At most ``count`` directions: fewer where the rows vary in fewer.

        Raises:
            ValueError: for rows with values that are not finite.
        """
        if not np.isfinite(self._squares):
            raise ValueError("has values that are not finite")
        if not self.count:
            return Directions(np.zeros((self.width, 0)), np.zeros(0))
        mean = self._sum / self.count
        total = self._squares - self.count * float(mean @ mean)
        # The sum of what one row gives is linear in x^T x: a mean counts as n rows of it.
        of_mean: Any = self.count * self._product(mean[None, :])
        values, vectors = self._decomposed(self._products - of_mean)
        middle = float(np.square(self._about + mean).sum()) * self.count
        least = _ROUNDING * max(float(values[0]), middle)
        found = min(count, int((values > least).sum()))
        vectors = vectors[:, :found]
        return Directions(vectors * row_signs(vectors.T), values[:found] / total)


class SketchedSpread(Spread):
    """The covariance C of wide rows by a sketch C X, X: (width, l) normal, l << width.

    C ~ (C X) (X^T C X)^+ (C X)^T, the approximation of Nyström. It is near where variances
    fall off within l directions, and memory and time are l / width of those for C.

    Args:
        width: The length of a row.
        count: For how many directions it is to be used; l is twice that and 128.

    Reference: Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a
    Positive-Semidefinite Matrix from Streaming Data", arXiv:1706.05736, section 2.
    """

    def __init__(self, width: int, count: int) -> None:
        size = min(width, 2 * count + 128)
        self._test = np.random.default_rng(0).normal(size=(width, size))
        super().__init__(width)

    def _start(self) -> np.ndarray:
        return np.zeros(self._test.shape)

    def _product(self, rows: np.ndarray) -> np.ndarray:
        return rows.T @ (rows @ self._test)

    def _decomposed(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        core = self._test.T @ products
        values, vectors = np.linalg.eigh((core + core.T) / 2)
        kept = values > _ROUNDING * max(values[-1], 0.0)
        if not kept.any():
            return np.zeros(1), np.eye(self.width, 1)
        root = (products @ vectors[:, kept]) / np.sqrt(values[kept])
        q, r = np.linalg.qr(root)
        u, s, _ = np.linalg.svd(r)
        return s**2, q @ u


def spread_of(width: int, count: int) -> Spread:
    """What finds ``count`` directions of rows: exactly, or for wide rows by a sketch."""
    return Spread(width) if width <= WHOLE_WIDTH else SketchedSpread(width, count)


def most(rank: int, rho: float) -> int:
    """The largest rank that a layer of ``rank`` may get: rho times as much."""
    return int(rho * rank + 1e-9)


def share_ranks(
    ratios: Mapping[Any, np.ndarray], ranks: Mapping[Any, int], rho: float
) -> dict[Any, int]:
    """Ranks of the same sum, given to the directions that explain most of their variance.

    Each layer gets one direction; the others go to the largest ratios of all layers
    together, where no layer gets more than rho times its rank, nor than its inputs have.

    Args:
        ratios: For each layer, by a key, the parts of the variance that its directions
            explain, in decreasing order; at least one.
        ranks: For each layer its rank before.
        rho: At least 1; with 1 every layer keeps its rank.

    Returns:
        The ranks by the same keys. Their sum is the same unless too few directions are left.

    Example:
        >>> ratios = {"a": np.array([0.9, 0.1]), "b": np.array([0.4, 0.3, 0.2, 0.1])}
        >>> share_ranks(ratios, {"a": 2, "b": 2}, rho=2.0)
        {'a': 1, 'b': 3}

    Reference: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
    Adaptation", arXiv:2410.07170, section 3.3.
    """
    left = sum(ranks.values()) - len(ranks)
    wanted = [
        (-float(ratio), key)
        for key, found in ratios.items()
        for ratio in found[1 : most(ranks[key], rho)]
    ]
    shared = dict.fromkeys(ratios, 1)
    for _, key in sorted(wanted, key=lambda one: one[0])[:left]:
        shared[key] += 1
    return shared
