"""Where the factors A and B start: by chance, or at what is largest in the kernel.

A kernel is seen here as a matrix W of shape (m, n), from m inputs to n outputs; that of a
convolution as (kernel height * kernel width * in, out). With s = alpha / rank the update is
s A B, A: (m, r), B: (r, n). A layer whose update is not zero at the start computes with
W + s (A B - A0 B0), A0 and B0 being the start, so that it gives what it gave before and its
base weight stays as it is. PEFT takes s A0 B0 off the base weight instead: the same function.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.initializers.svd import nearest_factors, randomized_svd, row_signs

#: The names of all starts; N stands for a number. "default" and "eva" are not computed here.
KNOWN = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "eva")


class Start(NamedTuple):
    """The factors that a layer starts with, in float32.

    Attributes:
        a: A, of shape (m, r).
        b: B, of shape (r, n).
        moved: Whether s A B is not zero, so that the layer must take it off again.
    """

    a: np.ndarray
    b: np.ndarray
    moved: bool


def check_init(name: Any, setting: str = "lora_init") -> None:
    """Raise unless ``name`` is one of ``KNOWN``, with a number for N.

    Raises:
        TypeError: if it is no string.
        ValueError: for another name; the nearest ones come first in the message.

    Example:
        >>> check_init("pissa_niter_4")
    """
    if not isinstance(name, str):
        raise TypeError(
            f"Received {setting}={name!r}; expected the name of a start: {', '.join(KNOWN)}."
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


def moves(name: str) -> bool:
    """Whether a start moves the update away from zero, so that it is taken off again."""
    return name == "olora" or name.startswith("pissa")


def start(
    method: str, matrix: np.ndarray, rank: int, scale: float, rng: np.random.Generator
) -> Start:
    """The factors with which the update of a kernel starts.

    * "gaussian": A normal with standard deviation 1 / r, B = 0.
    * "orthogonal": A = X Q_0 / 10, B = Q_1^T Y / 10 with normal X: (m, r / 2) and
      Y: (r / 2, n), and Q_0, Q_1 the rows of even and of odd number of one orthogonal matrix
      (r, r). Q_0 Q_1^T = 0, so A B is zero (but for rounding) though neither factor is.
    * "pissa": s A B is the best approximation of W of rank r. With W = U S V^T,
      A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r^T.
    * "pissa_niter_N": the same by a randomized SVD with N power iterations, which is much
      faster for large kernels and close where singular values fall off.
    * "olora": W^T = Q R with orthonormal columns in Q; A = R_r^T, B = Q_r^T, the first r of
      the rows of R and of the columns of Q. s does not enter, as in PEFT.

    The signs of singular vectors and of the columns of Q are chosen, so the same kernel gives
    the same factors everywhere: the largest entry of a row of B by magnitude is positive for
    PiSSA, the diagonal of R for OLoRA.

    Args:
        method: Which.
        matrix: The kernel as a matrix of shape (m, n), of any floating type.
        rank: The rank r, positive.
        scale: The scale s of the update.
        rng: Where random numbers come from; pissa and olora draw none.

    Returns:
        The factors; all is computed in float64 and rounded once.

    Raises:
        TypeError, ValueError: for a name that ``check_init`` refuses, or of a start that
            does not come from the kernel ("default", "eva").
        ValueError: for what is no matrix, or one with values that are not finite; a rank
            above min(m, n) for pissa and olora, an odd one for orthogonal; a scale for pissa
            that is not positive.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> w = rng.normal(size=(6, 4))
        >>> a, b, moved = start("pissa", w, rank=4, scale=2.0, rng=rng)
        >>> a.shape, b.shape, moved
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
            f"Received the start {method!r}, which does not come from the kernel; expected "
            "gaussian, orthogonal, pissa, pissa_niter_N or olora."
        )
    _check_kernel(method, w, rank)
    if method == "olora":
        return _olora(w, rank)
    return _pissa(w, rank, scale, rng, _iterations(method))


def _iterations(name: str) -> int | None:
    """N in "pissa_niter_N", else None."""
    found = re.fullmatch(r"pissa_niter_([0-9]+)", name)
    return int(found.group(1)) if found else None


def _check_kernel(method: str, w: np.ndarray, rank: int) -> None:
    if rank > min(w.shape):
        raise ValueError(
            f"Received lora_rank={rank} with lora_init={method!r} for a kernel of "
            f"{w.shape[0]} inputs and {w.shape[1]} outputs, which has no more than "
            f"{min(w.shape)} directions. Pass a rank of at most {min(w.shape)} (for this "
            "layer alone in lora_rank_pattern), or lora_init='gaussian'."
        )
    if not np.isfinite(w).all():
        raise ValueError(
            f"Received lora_init={method!r} for a kernel with values that are not finite. "
            "Load weights without them, or pass lora_init='gaussian'."
        )


def _rounded(a: np.ndarray, b: np.ndarray, moved: bool) -> Start:
    return Start(a.astype("float32"), b.astype("float32"), moved)


def _orthogonal(shape: tuple[int, ...], rank: int, rng: np.random.Generator) -> Start:
    if rank % 2:
        raise ValueError(
            f"Received lora_rank={rank} with lora_init='orthogonal'; expected an even rank, "
            "one half of which is for A and one for B. Pass "
            f"lora_rank={rank + 1}."
        )
    rows, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
    a = rng.normal(size=(shape[0], rank // 2)) @ rows[0::2]
    b = rows[1::2].T @ rng.normal(size=(rank // 2, shape[1]))
    return _rounded(a / 10, b / 10, False)


def _olora(w: np.ndarray, rank: int) -> Start:
    # Q's first columns are those of the first columns of W^T; R = Q^T W^T.
    q, r = np.linalg.qr(w.T[:, :rank])
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return _rounded(w @ q, q.T, True)


def _pissa(
    w: np.ndarray, rank: int, scale: float, rng: np.random.Generator, iterations: int | None
) -> Start:
    if not scale > 0:
        raise ValueError(
            f"Received a scale alpha / rank of {scale!r} with lora_init='pissa'; expected a "
            "positive one, whose root is part of the factors. Pass a positive lora_alpha."
        )
    if iterations is None:
        a, b, _, _ = nearest_factors(w, rank)
    else:
        u, s, vt = randomized_svd(w, rank, iterations, rng)
        root = np.sqrt(s[:rank])
        a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    signs = row_signs(b) / np.sqrt(scale)
    return _rounded(a * signs, signs[:, None] * b, True)
