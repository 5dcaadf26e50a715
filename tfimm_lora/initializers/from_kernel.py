"""Initialization of the factors A and B: at random, or from a decomposition of the kernel.

Here a kernel is a matrix W of shape (m, n), from m inputs to n outputs; the kernel of a
convolution has the shape (kernel height * kernel width * in, out). With s = alpha / rank, the
update is s A B, with A: (m, r) and B: (r, n). If the initial factors A0 and B0 have a product
other than zero, the layer computes with W + s (A B - A0 B0): its outputs are unchanged at
first, and its base weight stays as it is. PEFT subtracts s A0 B0 from the base weight instead,
which is the same function.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.initializers.svd import nearest_factors, randomized_svd, row_signs

#: The names of all initializations; N is a number. "default" and "eva" are computed elsewhere.
KNOWN = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "eva")


class InitialFactors(NamedTuple):
    """The initial factors of a layer, in float32.

    Attributes:
        a: A, of shape (m, r).
        b: B, of shape (r, n).
        subtracted: Whether s A B is not zero, so that the layer must subtract it.
    """

    a: np.ndarray
    b: np.ndarray
    subtracted: bool


def check_init(name: Any, setting: str = "lora_init") -> None:
    """Raise unless ``name`` is one of ``KNOWN``, with a number for N.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is another name; the message lists the nearest names first.

    Example:
        >>> check_init("pissa_niter_4")
    """
    if not isinstance(name, str):
        raise TypeError(
            f"Received {setting}={name!r}; expected the name of an initialization: "
            f"{', '.join(KNOWN)}."
        )
    if (name in KNOWN and name != "pissa_niter_N") or _iterations(name) is not None:
        return

    def distance(known: str) -> float:
        return -difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()

    raise ValueError(
        f"Received {setting}={name!r}; expected one of, nearest first: "
        f"{', '.join(sorted(KNOWN, key=distance))} (with a number of power iterations for N, "
        "for example pissa_niter_4)."
    )


def subtracts_initial_update(name: str) -> bool:
    """Whether the initial update is not zero, so that the layer must subtract it."""
    return name == "olora" or name.startswith("pissa")


def initial_factors(
    method: str, matrix: np.ndarray, rank: int, scale: float, rng: np.random.Generator
) -> InitialFactors:
    """Compute the initial factors of the update of a kernel.

    * "gaussian": A is normal with standard deviation 1 / r, B = 0.
    * "orthogonal": A = X Q_0 / 10 and B = Q_1^T Y / 10, with normal X: (m, r / 2) and
      Y: (r / 2, n). Q_0 and Q_1 are the even and the odd rows of one orthogonal matrix
      (r, r), so Q_0 Q_1^T = 0 and A B = 0 up to rounding, though neither factor is zero.
    * "pissa": s A B is the best approximation of rank r of W. With W = U S V^T,
      A = U_r sqrt(S_r / s) and B = sqrt(S_r / s) V_r^T.
    * "pissa_niter_N": The same by a randomized SVD with N power iterations, which is much
      faster for large kernels and accurate where the singular values decay.
    * "olora": W^T = Q R with orthonormal columns of Q; A = R_r^T and B = Q_r^T, from the
      first r rows of R and the first r columns of Q. It does not depend on s, as in PEFT.

    The signs of singular vectors and of the columns of Q are fixed, so that the same kernel
    has the same factors everywhere: for PiSSA the entry of largest magnitude in each row of B
    is positive, for OLoRA the diagonal of R.

    Args:
        method: The name of the initialization.
        matrix: The kernel as a matrix of shape (m, n), of any floating type.
        rank: The rank r, positive.
        scale: The scale s of the update.
        rng: The source of random numbers. "pissa" and "olora" use none.

    Returns:
        The factors, computed in float64 and rounded once to float32.

    Raises:
        TypeError: If ``method`` is not a string.
        ValueError: If ``method`` is unknown or is not computed from the kernel ("default",
            "eva"); if ``matrix`` is not a matrix, or not finite; if the rank is above
            min(m, n) for "pissa" and "olora", or odd for "orthogonal"; if the scale is not
            positive for "pissa".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> w = rng.normal(size=(6, 4))
        >>> a, b, subtracted = initial_factors("pissa", w, rank=4, scale=2.0, rng=rng)
        >>> a.shape, b.shape, subtracted
        ((6, 4), (4, 4), True)
        >>> bool(np.abs(w - 2.0 * a @ b).max() < 1e-6)
        True

    Reference: Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors
    Adaptation of Large Language Models", arXiv:2404.02948, section 3; Büyükakyüz, "OLoRA:
    Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775, section 3;
    Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv:0909.4061,
    algorithms 4.4 and 5.1; "gaussian" and "orthogonal" are defined by PEFT.
    """
    check_init(method)
    w = np.asarray(matrix, dtype="float64")
    if w.ndim != 2:
        raise ValueError(
            f"Received a kernel of shape {w.shape}; expected a matrix of shape (inputs, "
            "outputs). Reshape the kernel first."
        )
    if method == "gaussian":
        return _rounded(
            rng.normal(scale=1 / rank, size=(len(w), rank)), np.zeros((rank, w.shape[1])), False
        )
    if method == "orthogonal":
        return _orthogonal(w.shape, rank, rng)
    if method in ("default", "eva"):
        raise ValueError(
            f"Received the initialization {method!r}, which is not computed from the kernel; "
            "expected gaussian, orthogonal, pissa, pissa_niter_N or olora."
        )
    _check_kernel(method, w, rank)
    if method == "olora":
        return _olora(w, rank)
    return _pissa(w, rank, scale, rng, _iterations(method))


def _iterations(name: str) -> int | None:
    """Return N of "pissa_niter_N", or None for other names."""
    found = re.fullmatch(r"pissa_niter_([0-9]+)", name)
    return int(found.group(1)) if found else None


def _check_kernel(method: str, w: np.ndarray, rank: int) -> None:
    if rank > min(w.shape):
        raise ValueError(
            f"Received lora_rank={rank} with lora_init={method!r} for a kernel of "
            f"{w.shape[0]} inputs and {w.shape[1]} outputs, which has at most {min(w.shape)} "
            f"singular vectors. Pass a rank of at most {min(w.shape)} (for this layer only, "
            "in lora_rank_pattern), or lora_init='gaussian'."
        )
    if not np.isfinite(w).all():
        raise ValueError(
            f"Received lora_init={method!r} for a kernel with values that are not finite; "
            "expected finite values. Load other weights, or pass lora_init='gaussian'."
        )


def _rounded(a: np.ndarray, b: np.ndarray, subtracted: bool) -> InitialFactors:
    return InitialFactors(a.astype("float32"), b.astype("float32"), subtracted)


def _orthogonal(shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> InitialFactors:
    if rank % 2:
        raise ValueError(
            f"Received lora_rank={rank} with lora_init='orthogonal'; expected an even rank, "
            f"since half of the directions are used for A and half for B. Pass "
            f"lora_rank={rank + 1}."
        )
    rows, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
    a = rng.normal(size=(shape[0], rank // 2)) @ rows[0::2]
    b = rows[1::2].T @ rng.normal(size=(rank // 2, shape[1]))
    return _rounded(a / 10, b / 10, False)


def _olora(w: np.ndarray, rank: int) -> InitialFactors:
    # Q's first columns are those of the first columns of W^T; R = Q^T W^T.
    q, r = np.linalg.qr(w.T[:, :rank])
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return _rounded(w @ q, q.T, True)


def _pissa(
    w: np.ndarray, rank: int, scale: float, rng: np.random.Generator, iterations: int | None
) -> InitialFactors:
    if not scale > 0:
        raise ValueError(
            f"Received a scale alpha / rank of {scale!r} with lora_init='pissa'; expected a "
            "positive scale, since its root divides the factors. Pass a positive lora_alpha."
        )
    if iterations is None:
        a, b, _, _ = nearest_factors(w, rank)
    else:
        u, s, vt = randomized_svd(w, rank, iterations, rng)
        root = np.sqrt(s[:rank])
        a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    signs = row_signs(b) / np.sqrt(scale)
    return _rounded(a * signs, signs[:, None] * b, True)
