"""``LayerUpdate``: the low-rank update of one layer's weight, as an immutable value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tfimm_lora.layers.loha import lora_factors
from tfimm_lora.layers.qkv import moves_only

#: The kinds of layers whose update PEFT supports too; see ``LayerUpdate.kind``.
PEFT_KINDS = ("linear", "conv", "embedding")

#: The kinds that exist only here, each with the reason that error messages give.
OWN_KINDS = {
    "grouped": "PEFT's A is not grouped",
    "depthwise": "PEFT's A is not grouped",
    "standardised": "PEFT standardises its factors too, which cannot be merged",
    "batched": "PEFT has no layer with a kernel for each position",
}


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """The update of one layer's weight: dW = scale * B A.

    With a second pair of factors (LoHa) it is dW = scale * (B A) * (B2 A2), elementwise. With a
    magnitude m (DoRA) the weight is m (W + dW) / |W + dW|, with norms over all axes but the
    first. With a bias c, scale * c is added to the layer's bias.

    Attributes:
        a: A, (rank, in) or (rank, in, *kernel_size).
        b: B, (out, rank) or (out, rank, 1, ...).
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA.
        kind: "linear", "conv" or "embedding" as in PEFT; or "grouped", "depthwise",
            "standardised" or "batched" (an einsum with an axis in all its terms), which PEFT
            does not have.
        qkv: For a fused projection whose query, key or value blocks were adapted separately:
            these blocks and the layout, for example ("qv", "qkv"). B is zero outside their
            entries. Otherwise None.
        magnitude: The DoRA magnitude m, (out,), or None.
        bias: The bias c of the branch (PEFT's lora_bias), (out,), or None.
        a2, b2: A2 and B2 of LoHa, in the shapes of A and B, or None. An update of PEFT's LoHa
            for a convolution has A in the shape (rank, in * kernel size).
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0
    kind: str = "linear"
    qkv: tuple[str, str] | None = None
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    a2: np.ndarray | None = None
    b2: np.ndarray | None = None

    def __post_init__(self) -> None:
        vectors = [name for name in ("magnitude", "bias") if getattr(self, name) is not None]
        second = [name for name in ("a2", "b2") if getattr(self, name) is not None]
        for name in ("a", "b", *vectors, *second):
            value = np.array(getattr(self, name))
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "scale", float(self.scale))
        for name in ("a", "b", "scale", *vectors, *second):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind != "f" or not value.size or not np.isfinite(value).all():
                raise ValueError(
                    f"Received {name} of type {value.dtype} and shape {value.shape}; expected "
                    "at least one value, and all of them finite floating point numbers."
                )
        if self.kind not in PEFT_KINDS and self.kind not in OWN_KINDS:
            raise ValueError(
                f"Received kind={self.kind!r}; expected one of "
                f"{', '.join((*PEFT_KINDS, *OWN_KINDS))}."
            )
        if self.a.ndim < 2 or self.b.ndim < 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"Received A of shape {self.a.shape} and B of shape {self.b.shape}; expected "
                "(rank, in, ...) and (out, rank, ...)."
            )
        self._check_second(second, vectors)
        for name in vectors:
            value = getattr(self, name)
            if value.shape != self.b.shape[:1]:
                raise ValueError(
                    f"Received {name} of shape {value.shape} with B of shape {self.b.shape}; "
                    f"expected one value for each output, {self.b.shape[:1]}."
                )

    def _check_second(self, second: list[str], vectors: list[str]) -> None:
        """Raise unless the second pair of factors is whole, and alone with the first."""
        if not second:
            return
        shapes = {name: getattr(self, name).shape for name in second}
        if shapes != {"a2": self.a.shape, "b2": self.b.shape}:
            raise ValueError(
                f"Received a second pair of factors of shapes {shapes}; expected a2 of shape "
                f"{self.a.shape} and b2 of shape {self.b.shape}, as the first pair."
            )
        if vectors:
            raise ValueError(
                f"Received a second pair of factors (LoHa) and a {' and a '.join(vectors)}; "
                "expected neither a magnitude nor a bias with it."
            )
        if self.kind in ("embedding", "batched"):
            raise ValueError(
                f"Received a second pair of factors (LoHa) for the kind {self.kind!r}; "
                "expected another kind."
            )

    @property
    def is_loha(self) -> bool:
        """Whether the update has a second pair of factors."""
        return self.a2 is not None

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the pairs of factors: (A, B), and with LoHa (A2, B2)."""
        second = [] if self.a2 is None or self.b2 is None else [(self.a2, self.b2)]
        return [(self.a, self.b), *second]

    def as_lora(self) -> LayerUpdate:
        """Return an update of LoHa as that of LoRA which it is equal to, of rank rank^2.

        Its A has the products of all pairs of rows of A and A2, its B those of the columns of
        B and B2; within a block, if blocks of a projection were adapted separately. Other
        updates are returned as they are.
        """
        if not self.is_loha:
            return self
        a, b = self.matrices()
        ones = (1,) * (self.b.ndim - 2)
        return LayerUpdate(
            a.reshape(-1, *self.a.shape[1:]).astype(self.a.dtype),
            b.reshape(*b.shape, *ones).astype(self.b.dtype),
            self.scale,
            self.kind,
            self.qkv if self.moves_only_its_blocks() else None,
        )

    @property
    def rank(self) -> int:
        """The rank r of the factors. With LoHa the rank of the update is up to r^2."""
        return int(self.a.shape[0])

    @property
    def lora_rank(self) -> int:
        """The rank of the update as LoRA: r, with LoHa r^2, which separate blocks have each."""
        return self.rank**2 // self.separate_blocks() if self.is_loha else self.rank

    def moves_only_its_blocks(self) -> bool:
        """Return whether the update is zero outside of the blocks of a projection it names."""
        if self.qkv is None or self.b.ndim != 2 or not all(self.qkv):
            return False
        return all(moves_only(b.T, *self.qkv) for _, b in self.pairs())

    def separate_blocks(self) -> int:
        """Return the number of blocks of a fused projection that have factors of their own."""
        return len(self.qkv[0]) if self.qkv and self.moves_only_its_blocks() else 1

    def not_in_peft(self) -> str | None:
        """Return why PEFT cannot express the update, or None."""
        if self.is_loha:
            if self.kind in ("grouped", "depthwise") and self.a.ndim < 5:
                return None
            if self.a.ndim > 4:
                return "PEFT's LoHa has no 3-D convolutions"
        return OWN_KINDS.get(self.kind)

    @property
    def alpha(self) -> float:
        """The lora_alpha for which scale = alpha / rank, up to floating point rounding."""
        return self.scale * self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dW, (out, in, ...)."""
        return (self.b.shape[0], *self.a.shape[1:])

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return A as (rank, in * kernel size) and B as (out, rank), in float64.

        With LoHa they are those of ``as_lora``.
        """
        pairs = [
            (
                a.reshape(self.rank, -1).astype("float64"),
                b.reshape(self.b.shape[0], self.rank).astype("float64"),
            )
            for a, b in self.pairs()
        ]
        if len(pairs) == 1:
            return pairs[0]
        found: tuple[np.ndarray, np.ndarray]
        found = lora_factors(np, pairs, 0, 1, self.separate_blocks())
        return found

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(value.size for value in self.arrays().values())

    def delta(self) -> np.ndarray:
        """Compute dW in float64, in the shape of the weight: (out, in, ...)."""
        a, b = self.matrices()
        product: np.ndarray = self.scale * (b @ a)
        return product.reshape(self.shape)

    def effective_kernel(self, kernel: np.ndarray) -> np.ndarray:
        """Compute the adapted weight from the base weight, in float64.

        It is W + dW, or with a magnitude m (W + dW) / |W + dW|. An output whose W + dW is zero
        stays zero.

        Args:
            kernel: W, of the shape of the update, up to axes of size 1: (out, in, ...).
        """
        adapted: np.ndarray = kernel.reshape(self.shape).astype("float64") + self.delta()
        if self.magnitude is None:
            return adapted
        norms = np.linalg.norm(adapted.reshape(len(adapted), -1), axis=1)
        gains = self.magnitude / np.where(norms, norms, 1.0)
        scaled: np.ndarray = adapted * gains.reshape(-1, *(1 for _ in adapted.shape[1:]))
        return scaled

    def singular_values(self) -> np.ndarray:
        """Compute the singular values of dW as a matrix (out, in * kernel size).

        Returns:
            At most ``rank`` values, with LoHa rank^2, in decreasing order.
        """
        a, b = self.matrices()
        # Those of the small matrix in the middle of Q_b (R_b R_a^T) Q_a^T.
        middle = (
            np.asarray(np.linalg.qr(b, mode="r")) @ np.asarray(np.linalg.qr(a.T, mode="r")).T
        )
        return abs(self.scale) * np.linalg.svd(middle, compute_uv=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name: a and b, and the others if there are any."""
        names = ("a", "b", "a2", "b2", "magnitude", "bias")
        named = {name: getattr(self, name) for name in names}
        return {name: value for name, value in named.items() if value is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerUpdate, tuple(getattr(self, each.name) for each in fields(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerUpdate):
            return NotImplemented
        mine, theirs = ((x.scale, x.kind, x.qkv) for x in (self, other))
        return mine == theirs and same_arrays(self.arrays(), other.arrays())

    __hash__ = None  # type: ignore[assignment]


def same_arrays(one: Any, other: Any) -> bool:
    """Whether two mappings have the same keys, dtypes and values."""
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype and np.array_equal(value, other[key])
        for key, value in one.items()
    )
