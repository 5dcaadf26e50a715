"""Combine the updates of one layer: ``CombinationMethod``, with checked arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tfimm_lora.adapters.decompose import make_update, result_dtype
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.merge_rules import MAJORITY_SIGN_METHODS, RULES, Rule, mix
from tfimm_lora.initializers.svd import nearest_factors, product_norm, truncate_product
from tfimm_lora.validation import check_choice, check_integer, check_number

#: The combination types of ``combine_adapters``, by PEFT's names.
COMBINATION_TYPES = (
    "cat",
    "svd",
    *RULES,
    *(f"{name}_svd" for name in RULES if name != "linear"),
)

#: An adapter's update of one layer, and its weight in the sum.
Term = tuple[LayerUpdate, float]


class Loss(NamedTuple):
    """The effect of truncation on a layer.

    Attributes:
        lost: The Frobenius norm of what was truncated.
        size: The Frobenius norm of the update before truncation.
    """

    lost: float = 0.0
    size: float = 0.0


@dataclass(frozen=True)
class CombinationMethod:
    """How the updates of a layer are combined.

    Its attributes are arguments of ``combine_adapters``.
    """

    combination_type: str
    rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.combination_type
        check_choice(name, "combination_type", COMBINATION_TYPES)
        if self.truncates and self.rank is not None:
            check_integer(self.rank, "rank", least=1)
        elif self.rank is not None:
            raise ValueError(
                f"Received rank={self.rank!r} with combination_type={name!r}, whose rank is "
                "determined by the adapters. Leave it out, or pass combination_type='svd'."
            )
        self._check_density()
        check_choice(self.majority_sign_method, "majority_sign_method", MAJORITY_SIGN_METHODS)
        check_integer(self.seed, "seed", least=0)

    def _check_density(self) -> None:
        name, density = self.combination_type, self.density
        if not (self.rule and self.rule.prune):
            if density is not None:
                raise ValueError(
                    f"Received density={density!r} with combination_type={name!r}, which "
                    "does not prune. Leave it out, or pass for example 'ties'."
                )
            return
        if density is None:
            raise ValueError(
                f"Received no density with combination_type={name!r}; expected the fraction "
                "of entries to keep, in (0, 1], for example density=0.2."
            )
        check_number(density, "density", 0, exclusive=True, most=1)

    @property
    def truncates(self) -> bool:
        """Whether the result is truncated by a singular value decomposition."""
        return self.combination_type.endswith("svd")

    @property
    def rule(self) -> Rule | None:
        """How entries are pruned and mixed; None for cat and svd, which do neither of them."""
        return RULES.get(self.combination_type.removesuffix("_svd"))

    @property
    def mixes_factors(self) -> bool:
        """Whether A and B are mixed separately, which needs equal ranks."""
        return self.rule is not None and not self.truncates

    def combine(self, path: str, terms: list[Term]) -> tuple[LayerUpdate, Loss]:
        """Return the combined update of a layer, and the loss by truncation."""
        if self.combination_type == "cat":
            return _concatenated(terms), Loss()
        if self.mixes_factors:
            return self._mixed(path, terms), Loss()
        # The decomposition does not keep the zero blocks of `qkv`. It is dropped, and the
        # update of the whole kernel is correct without it.
        first = terms[0][0]
        rank = self.rank or max(update.rank for update, _ in terms)
        if self.combination_type == "svd":
            all_b, all_a = stacked(terms)
            b, a, kept, size = truncate_product(all_b, all_a, rank)
            size = _without_rounding(size, all_b, all_a)
        else:
            b, a, kept, size = nearest_factors(self._pruned(path, terms), rank)
        # By Pythagoras, since the truncated update is an orthogonal projection.
        lost = math.sqrt(max(size**2 - kept**2, 0.0))
        update = make_update(b, a, first.shape, first.kind, _dtype(terms))
        return update, Loss(lost, size)

    def _pruned(self, path: str, terms: list[Term]) -> np.ndarray:
        deltas = []
        for update, _ in terms:
            a, b = update.matrices()
            deltas.append(update.scale * (b @ a))
        return self._mix(deltas, [w for _, w in terms], self._rng(path))

    def _mixed(self, path: str, terms: list[Term]) -> LayerUpdate:
        factors = [update.matrices() for update, _ in terms]
        sizes = [w * update.scale for update, w in terms]
        roots = [math.sqrt(abs(size)) for size in sizes]
        # The sign goes into A only; in both factors it would cancel.
        signed = [math.copysign(root, size) for root, size in zip(roots, sizes)]
        rng = self._rng(path)
        mixed_a = self._mix([a for a, _ in factors], signed, rng)
        mixed_b = self._mix([b for _, b in factors], roots, rng)
        first = terms[0][0]
        update = make_update(mixed_b, mixed_a, first.shape, first.kind, _dtype(terms))
        # Blocks that are zero in every B are zero in the result.
        return LayerUpdate(update.a, update.b, 1.0, update.kind, _common_qkv(terms))

    def _mix(
        self, arrays: list[np.ndarray], weights: list[float], rng: np.random.Generator
    ) -> np.ndarray:
        assert self.rule is not None
        return mix(arrays, weights, self.rule, self.density, self.majority_sign_method, rng)

    def _rng(self, path: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *path.encode()])


def _concatenated(terms: list[Term]) -> LayerUpdate:
    """Return the exact sum: A = [w_i s_i A_i], B = [B_i]."""
    first, qkv = terms[0][0], _common_qkv(terms)
    groups = len(qkv[0]) if qkv else 1
    if first.kind == "batched":
        groups = _positions([update.b for update, _ in terms])
    b, a = stacked(terms, groups)
    update = make_update(b, a, first.shape, first.kind, _dtype(terms))
    return LayerUpdate(update.a, update.b, 1.0, update.kind, qkv)


def stacked(terms: list[Term], groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Stack the factors of a weighted sum.

    Args:
        terms: The updates and their weights.
        groups: The number of groups in which the ranks of each update come: one group for
            each adapted block of a fused projection, or for each position of a batched
            kernel. The result has the same groups.

    Returns:
        B (out, sum of ranks) and A (sum of ranks, in * kernel size), in float64.
    """
    pieces_a, pieces_b = [], []
    for update, weight in terms:
        a, b = update.matrices()
        pieces_a.append(np.split(weight * update.scale * a, groups, axis=0))
        pieces_b.append(np.split(b, groups, axis=1))
    return (
        np.concatenate([b for group in zip(*pieces_b) for b in group], axis=1),
        np.concatenate([a for group in zip(*pieces_a) for a in group], axis=0),
    )


def norm_of_sum(terms: list[Term]) -> float:
    """Return the Frobenius norm of the weighted sum; 0 if it is only rounding."""
    if not terms:
        return 0.0
    b, a = stacked(terms)
    return _without_rounding(product_norm(b, a), b, a)


def _without_rounding(norm: float, b: np.ndarray, a: np.ndarray) -> float:
    """Return the norm of B A, or 0 if it is so small that it may be rounding."""
    return norm if norm > 1e-13 * np.linalg.norm(b) * np.linalg.norm(a) else 0.0


def _common_qkv(terms: list[Term]) -> tuple[str, str] | None:
    """Return the blocks that were adapted separately, if all updates have the same."""
    first = terms[0][0].qkv
    if first is None or any(x.qkv != first or x.rank % len(first[0]) for x, _ in terms):
        return None
    return first


def _positions(factors: list[np.ndarray]) -> int:
    """Return the largest number of equal blocks with which every B is block diagonal."""
    common = math.gcd(*(size for b in factors for size in b.shape[:2]))
    return next(
        count
        for count in range(common, 0, -1)
        if common % count == 0 and all(_is_block_diagonal(b, count) for b in factors)
    )


def _is_block_diagonal(b: np.ndarray, count: int) -> bool:
    out, rank = b.shape[:2]
    blocks = b.reshape(count, out // count, count, rank // count).swapaxes(1, 2)
    return not blocks[~np.eye(count, dtype=bool)].any()


def _dtype(terms: list[Term]) -> np.dtype:
    return result_dtype(*(x for update, _ in terms for x in (update.a, update.b)))
