"""Low-rank approximations of matrices and of products of matrices. NumPy only."""

from __future__ import annotations

import numpy as np

#: The number of extra directions that the randomized decomposition computes.
OVERSAMPLING = 10


def nearest_factors(
    matrix: np.ndarray, rank: int | None = None, energy: float | None = None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return the factors of the best approximation of rank r of a matrix.

    The basis comes from the eigenvectors of the smaller of M M^T and M^T M, which takes a
    fifth to a tenth of the time of a singular value decomposition of M. Directions below
    1e-8 of the largest singular value are lost; float32 cannot represent them either.

    Args:
        matrix: M, of shape (out, in).
        rank: The rank r, or None to choose it by ``energy``.
        energy: The fraction of the squared norm that the approximation must keep.

    Returns:
        B (out, r) and A (r, in), which have equal norms; and the Frobenius norms of B A and
        of M.
    """
    transposed = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if transposed else matrix
    squares, basis = np.linalg.eigh(short @ short.T)
    squares, basis = squares[::-1], basis[:, ::-1]
    if rank is None:
        assert energy is not None
        rank = _rank_of_energy(squares, energy)
    basis = basis[:, :rank]
    b, a, kept, _ = truncate_product(basis, basis.T @ short, rank)
    if transposed:
        b, a = a.T, b.T
    return b, a, kept, float(np.linalg.norm(matrix))


def truncate_product(
    b: np.ndarray, a: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return the factors of the best low-rank approximation of B A, without forming B A.

    With B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small
    matrix R_b R_a^T.

    Args:
        b, a: (out, k) and (k, in).
        rank: The largest rank of the result, which is never above k, out or in.

    Returns:
        B (out, r) and A (r, in), each with the square roots of the singular values; and the
        Frobenius norms of their product and of the given product.
    """
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    new_b, new_a = q_b @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ q_a.T
    return new_b, new_a, float(np.linalg.norm(s[:rank])), float(np.linalg.norm(s))


def product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """Return the Frobenius norm of B A, without forming it and without cancellation."""
    r_b, r_a = (np.asarray(np.linalg.qr(x, mode="r")) for x in (b, a.T))
    return float(np.linalg.norm(r_b @ r_a.T))


def _rank_of_energy(squares: np.ndarray, energy: float) -> int:
    """Return the smallest rank that keeps this fraction of squares in decreasing order."""
    # Zeros with rounding errors must not count, or an energy of 1 would need the full rank.
    floor = len(squares) * np.finfo(squares.dtype).eps * max(squares[0], 0.0)
    held = np.cumsum(np.where(squares > floor, squares, 0.0))
    return int(np.searchsorted(held, energy * held[-1])) + 1


def row_signs(rows: np.ndarray) -> np.ndarray:
    """Return the sign of the entry of largest magnitude in each row; 1 for a row of zeros."""
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    return np.where(largest[:, 0] < 0, -1.0, 1.0)


def randomized_svd(
    w: np.ndarray, rank: int, iterations: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the leading part of an SVD, W ~ U diag(S) V^T, by random projection.

    The range of W is approximated by that of W (W^T W)^iterations X with a normal
    X: (n, rank + 10). The basis is orthonormalized after each product, so that small singular
    values are not lost to rounding.

    Returns:
        U: (m, k), S: (k,) and V^T: (k, n), k = min(m, n, rank + 10).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> w = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 40))
        >>> u, s, vt = randomized_svd(w, 3, 1, rng)
        >>> bool(np.allclose((u * s) @ vt, w))
        True

    Reference: Halko, Martinsson and Tropp, "Finding structure with randomness",
    arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(rank + OVERSAMPLING, *w.shape)
    q, _ = np.linalg.qr(w @ rng.normal(size=(w.shape[1], width)))
    for _ in range(iterations):
        other, _ = np.linalg.qr(w.T @ q)
        q, _ = np.linalg.qr(w @ other)
    u, s, vt = np.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, vt
