"""Principal directions of rows of numbers, computed batch by batch. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.initializers.svd import row_signs

#: Up to this width the full covariance is kept: 8 MB in float64, a second to decompose.
FULL_WIDTH = 1024

#: A variance below this fraction of the largest one, or of the mean's square, is rounding.
_ROUNDING = 1e-12


class Directions(NamedTuple):
    """Principal directions, in order of decreasing variance.

    Attributes:
        vectors: Orthonormal columns, of shape (width, k). The entry of the largest magnitude
            in each column is positive.
        ratios: The fraction of the total variance that each direction explains, of shape
            (k,).
    """

    vectors: np.ndarray
    ratios: np.ndarray


class Covariance:
    """The full covariance of rows: the sums of (x - c)^T (x - c) and of x - c, for a fixed c.

    c is the mean of the first batch, so that little precision is lost where the mean is large.

    Args:
        width: The length of a row.

    Example:
        >>> covariance = Covariance(2)
        >>> covariance.add(np.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> covariance.add(np.array([[5.0, 5.0]]))
        >>> covariance.directions(2)
        Directions(vectors=array([[1.],
               [0.]]), ratios=array([1.]))
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._center = np.zeros(width)
        self._sum = np.zeros(width)
        self._squares = 0.0
        self._products = self._zero_products()

    def _zero_products(self) -> np.ndarray:
        return np.zeros((self.width, self.width))

    def _product(self, rows: np.ndarray) -> Any:
        """What ``rows`` add to n times the covariance."""
        return rows.T @ rows

    def _decomposed(self, products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues in decreasing order, and the eigenvectors as columns."""
        values, vectors = np.linalg.eigh(products)
        return values[::-1], vectors[:, ::-1]

    def add(self, rows: np.ndarray) -> None:
        """Include rows of shape (n, width)."""
        if not len(rows):
            return
        rows = np.asarray(rows, dtype="float64")
        if not self.count:
            self._center = rows.mean(axis=0)
        rows = rows - self._center
        self.count += len(rows)
        self._sum += rows.sum(axis=0)
        self._squares += float(np.square(rows).sum())
        self._products += self._product(rows)

    def directions(self, count: int) -> Directions:
        """Return at most ``count`` directions; fewer where the rows vary in fewer.

        Raises:
            ValueError: If a row had a value that is not finite.
        """
        if not np.isfinite(self._squares):
            raise ValueError("has values that are not finite")
        if not self.count:
            return Directions(np.zeros((self.width, 0)), np.zeros(0))
        mean = self._sum / self.count
        total = self._squares - self.count * float(mean @ mean)
        # `_product` is linear in x^T x, so the mean counts as n rows of it.
        of_mean = self.count * self._product(mean[None, :])
        values, vectors = self._decomposed(self._products - of_mean)
        mean_square = float(np.square(self._center + mean).sum()) * self.count
        least = _ROUNDING * max(float(values[0]), mean_square)
        found = min(count, int((values > least).sum()))
        vectors = vectors[:, :found]
        return Directions(vectors * row_signs(vectors.T), values[:found] / total)


class SketchedCovariance(Covariance):
    """The covariance C of wide rows, by a sketch C X with X: (width, l) normal, l << width.

    C ~ (C X) (X^T C X)^+ (C X)^T, the Nyström approximation. It is accurate where the
    variances decay within l directions. Memory and time are l / width of those for C.

    Args:
        width: The length of a row.
        count: The number of directions that will be asked for; l is 2 * count + 128.

    Reference: Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a
    Positive-Semidefinite Matrix from Streaming Data", arXiv:1706.05736, section 2.
    """

    def __init__(self, width: int, count: int) -> None:
        size = min(width, 2 * count + 128)
        self._test = np.random.default_rng(0).normal(size=(width, size))
        super().__init__(width)

    def _zero_products(self) -> np.ndarray:
        return np.zeros(self._test.shape)

    def _product(self, rows: np.ndarray) -> Any:
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


def covariance_for(width: int, count: int) -> Covariance:
    """Return a covariance that can find ``count`` directions; a sketch for wide rows."""
    return Covariance(width) if width <= FULL_WIDTH else SketchedCovariance(width, count)


def max_rank(rank: int, rho: float) -> int:
    """Return the largest rank that a layer of ``rank`` may get: rho times as much."""
    return int(rho * rank + 1e-9)


def redistribute_ranks(
    ratios: Mapping[Any, np.ndarray], ranks: Mapping[Any, int], rho: float
) -> dict[Any, int]:
    """Redistribute ranks over layers by explained variance, keeping their sum.

    Each layer gets one direction. The others go to the largest ratios over all layers
    together. No layer gets more than rho times its rank, or than its inputs have directions.

    Args:
        ratios: Layer key -> the fractions of the variance that its directions explain, in
            decreasing order; at least one.
        ranks: Layer key -> its present rank.
        rho: At least 1; with 1 every layer keeps its rank.

    Returns:
        Layer key -> new rank. The sum is the same unless too few directions are left.

    Example:
        >>> ratios = {"a": np.array([0.9, 0.1]), "b": np.array([0.4, 0.3, 0.2, 0.1])}
        >>> redistribute_ranks(ratios, {"a": 2, "b": 2}, rho=2.0)
        {'a': 1, 'b': 3}

    Reference: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
    Adaptation", arXiv:2410.07170, section 3.3.
    """
    left = sum(ranks.values()) - len(ranks)
    candidates = [
        (-float(ratio), key)
        for key, found in ratios.items()
        for ratio in found[1 : max_rank(ranks[key], rho)]
    ]
    shared = dict.fromkeys(ratios, 1)
    for _, key in sorted(candidates, key=lambda candidate: candidate[0])[:left]:
        shared[key] += 1
    return shared
