"""Low-rank updates from the difference of two weights, by singular value decomposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.initializers.svd import nearest_factors
from tfimm_lora.validation import check_integer, check_number


def extract_update(
    difference: np.ndarray,
    rank: int | None = None,
    energy: float | None = None,
    kind: str | None = None,
) -> LayerUpdate:
    """Compute the best low-rank update for the change of a weight in full fine-tuning.

    With the singular value decomposition dW = U S V^T, the factors are B = U_r sqrt(S_r) and
    A = sqrt(S_r) V_r^T. No other update of rank r is nearer to dW in Frobenius norm (Eckart
    and Young). The factors have equal norms, and the scale is 1.

    Args:
        difference: dW, the tuned weight minus the base weight, in torch's order of axes:
            (out, in) or (out, in, *kernel_size); the latter is decomposed as a matrix
            (out, in * kernel size).
        rank: The rank r, at most the smaller side of the matrix. Pass this or ``energy``.
        energy: A fraction in (0, 1]. The rank is the smallest whose squared singular values
            sum to at least this fraction of all. The relative error |dW - B A| / |dW| is then
            at most sqrt(1 - energy).
        kind: As in ``LayerUpdate``. None (default) means "linear" for two axes and "conv"
            for more.

    Returns:
        The update, in float32, or in float64 if the difference is.

    Raises:
        TypeError: If rank or energy has the wrong type.
        ValueError: If not exactly one of rank and energy is given, or it is out of range; or
            if the difference is not a matrix or kernel of finite numbers.

    Example:
        >>> import numpy as np
        >>> difference = np.outer([1.0, 2.0, 3.0], [1.0, -1.0])
        >>> update = extract_update(difference, energy=0.99)
        >>> update.rank, np.allclose(update.delta(), difference)
        (1, True)

    Reference: Eckart and Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1 (1936).
    """
    check_rank_or_energy(rank, energy)
    problem = _problem(difference, kind)
    if problem:
        raise ValueError(f"Received a difference {problem}")
    return _extract(np.asarray(difference), rank, energy, kind)


def extract_updates(
    differences: Mapping[str, np.ndarray],
    rank: int | None = None,
    energy: float | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, LayerUpdate]:
    """Apply ``extract_update`` to many layers. Layers that did not change are left out.

    Args:
        differences: Module path -> dW, as in ``extract_update``.
        rank, energy: As in ``extract_update``, for each layer.
        kinds: Module path -> kind, if it does not follow from the number of axes.

    Returns:
        Module path -> update, in the order of ``differences``.

    Raises:
        TypeError, ValueError: As ``extract_update``. The message names every wrong difference.

    Example:
        >>> import numpy as np
        >>> changed, same = np.ones((4, 3)), np.zeros((4, 3))
        >>> list(extract_updates({"fc1": changed, "fc2": same}, rank=2))
        ['fc1']
    """
    check_rank_or_energy(rank, energy)
    kinds = kinds or {}
    problems = [
        f"'{path}' {problem}"
        for path, difference in differences.items()
        if (problem := _problem(difference, kinds.get(path)))
    ]
    if problems:
        raise ValueError("Received differences:\n" + "\n".join(problems))
    return {
        path: _extract(np.asarray(difference), rank, energy, kinds.get(path))
        for path, difference in differences.items()
        if np.any(difference)
    }


def make_update(
    b: np.ndarray, a: np.ndarray, shape: tuple[int, ...], kind: str, dtype: Any
) -> LayerUpdate:
    """Create an update of scale 1 from matrices.

    Args:
        b: (out, r).
        a: (r, in * kernel size).
        shape: The shape of the weight. B gets an axis of size 1 for each axis of the kernel.
        kind: As in ``LayerUpdate``.
        dtype: The type of the factors.
    """
    rank = a.shape[0]
    return LayerUpdate(
        a.reshape(rank, *shape[1:]).astype(dtype),
        b.reshape(*b.shape, *(1 for _ in shape[2:])).astype(dtype),
        kind=kind,
    )


def result_dtype(*arrays: np.ndarray) -> np.dtype:
    """Return float64 if an array is, else float32; 16 bits are too few even for a sum."""
    return np.result_type(np.float32, *(a.dtype for a in arrays if a.dtype.kind not in "biu"))


def check_rank_or_energy(rank: Any, energy: Any) -> None:
    """Raise unless exactly one of the two is given and in its range."""
    if (rank is None) == (energy is None):
        raise ValueError(
            f"Received rank={rank!r} and energy={energy!r}; expected exactly one of them, "
            "for example rank=8, or energy=0.95 for the rank that each layer needs."
        )
    if rank is not None:
        check_integer(rank, "rank", least=1)
    else:
        check_number(energy, "energy", 0, exclusive=True, most=1)


def _extract(
    difference: np.ndarray, rank: int | None, energy: float | None, kind: str | None
) -> LayerUpdate:
    matrix: np.ndarray = difference.reshape(difference.shape[0], -1).astype("float64")
    b, a, _, _ = nearest_factors(matrix, rank, energy)
    kind = kind or ("linear" if difference.ndim == 2 else "conv")
    return make_update(b, a, difference.shape, kind, result_dtype(difference))


def _problem(difference: Any, kind: str | None) -> str | None:
    """Return the problem of a difference, as the end of a sentence, or None."""
    array = np.asarray(difference)
    if array.ndim < 2 or 0 in array.shape:
        return (
            f"of shape {array.shape}; expected (out, in) or (out, in, *kernel_size). Vectors "
            "such as biases have no low-rank update: store them in Adapter.weights."
        )
    if not np.isfinite(array.astype("float64")).all():
        return "with NaN or infinity; expected finite numbers. Check the tuned model."
    if kind == "batched":
        return (
            "of the kind 'batched', which has a kernel for each position; extract an update "
            "for each position separately."
        )
    return None
