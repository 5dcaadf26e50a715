"""``Adapter``: what a LoRA fine-tuning learned, as a value of its own.

Arrays are kept in torch's order of axes and layers go by the module paths of timm, because
adapter files do so; ``paths.py`` knows how a model's layers are named and turned.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

#: The kinds of layers whose update PEFT has too; see ``LayerUpdate.kind``.
PEFT_KINDS = ("linear", "conv", "embedding")

#: Kinds that exist only here, each with the reason that error messages give.
OWN_KINDS = {
    "grouped": "PEFT's A is not grouped",
    "depthwise": "PEFT's A is not grouped",
    "standardised": "PEFT standardises its factors too, which cannot be merged",
    "batched": "PEFT has no layer with a kernel for each position",
}


@dataclass(frozen=True, eq=False)
class LayerUpdate:
    """The update of one layer's weight: dW = scale * B A.

    With a magnitude m (DoRA) the weight is m (W + dW) / |W + dW|, norms being taken over all
    axes but the first. With a bias c the layer's bias is greater by scale * c.

    Attributes:
        a: A, (rank, in) or (rank, in, *kernel_size).
        b: B, (out, rank) or (out, rank, 1, ...).
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA.
        kind: "linear", "conv" or "embedding" as in PEFT; "grouped", "depthwise",
            "standardised" or "batched" (an einsum with an axis in all its terms) here.
        qkv: Where parts of a fused projection were adapted each by themselves, these parts
            and the layout, for example ("qv", "qkv"): B is then zero outside their blocks.
        magnitude: DoRA's m, (out,), or None.
        bias: That of the branch (PEFT's lora_bias), (out,), or None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0
    kind: str = "linear"
    qkv: tuple[str, str] | None = None
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        more = [name for name in ("magnitude", "bias") if getattr(self, name) is not None]
        for name in ("a", "b", *more):
            value = np.array(getattr(self, name))
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "scale", float(self.scale))
        for name in ("a", "b", "scale", *more):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind != "f" or not value.size or not np.isfinite(value).all():
                raise ValueError(
                    f"Received {name} of type {value.dtype}, shape {value.shape}; expected "
                    "finite floating point numbers, at least one."
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
        for name in more:
            value = getattr(self, name)
            if value.shape != self.b.shape[:1]:
                raise ValueError(
                    f"Received {name} of shape {value.shape} with B of shape {self.b.shape}; "
                    f"expected a number for each output, {self.b.shape[:1]}."
                )

    @property
    def rank(self) -> int:
        """The rank of the update."""
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float:
        """lora_alpha, with which scale = alpha / rank, but for the last bit of a float."""
        return self.scale * self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dW, (out, in, ...)."""
        return (self.b.shape[0], *self.a.shape[1:])

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """A as (rank, all else) and B as (out, rank), in float64."""
        a: np.ndarray = self.a.reshape(self.rank, -1).astype("float64")
        return a, self.b.reshape(self.b.shape[0], self.rank).astype("float64")

    @property
    def size(self) -> int:
        """The number of its numbers."""
        return sum(value.size for value in self.arrays().values())

    def delta(self) -> np.ndarray:
        """scale * B A in float64, in the shape of the weight: (out, in, ...)."""
        a, b = self.matrices()
        return (self.scale * (b @ a)).reshape(self.shape)

    def singular_values(self) -> np.ndarray:
        """Those of dW as a matrix (out, all else), largest first; at most ``rank`` many."""
        a, b = self.matrices()
        # Of the small product in the middle of Q_b (R_b R_a^T) Q_a^T.
        middle = (
            np.asarray(np.linalg.qr(b, mode="r")) @ np.asarray(np.linalg.qr(a.T, mode="r")).T
        )
        return abs(self.scale) * np.linalg.svd(middle, compute_uv=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """Its arrays by name: a, b, and magnitude and bias where it has them."""
        named = {name: getattr(self, name) for name in ("a", "b", "magnitude", "bias")}
        return {name: value for name, value in named.items() if value is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        plain = (self.a, self.b, self.scale, self.kind, self.qkv)
        return LayerUpdate, (*plain, self.magnitude, self.bias)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerUpdate):
            return NotImplemented
        mine, theirs = ((x.scale, x.kind, x.qkv, set(x.arrays())) for x in (self, other))
        named = other.arrays()
        return mine == theirs and all(_same(x, named[n]) for n, x in self.arrays().items())

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA fine-tuning as an immutable value: factors by layer, and what goes with them.

    Make one with ``Adapter.load`` or ``adapter_of``; put it into a model with
    ``load_adapter``.

    Attributes:
        layers: Module path -> ``LayerUpdate``. Module paths are timm's for tfimm models
            ("blocks.0.attn.qkv"), and for others the path of the layer with dots.
        weights: Key -> value of weights that were trained whole, in torch's names and order
            of axes: "head.weight", "blocks.0.norm1.bias".
        modules: The modules trained whole (PEFT's modules_to_save), for example ("head",).
            Weights outside of them are biases.
        base_model: The model that it was trained on: a hub id or a tfimm name; may be "".
        bias: Which biases were trained: "none", "lora_only" or "all".
        dropout: lora_dropout of the training.

    Two adapters are equal if all of this is, bit for bit.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> update = lora.LayerUpdate(np.ones((2, 8)), np.ones((4, 2)), scale=0.5)
        >>> adapter = lora.Adapter({"fc": update})
        >>> adapter.layers["fc"].delta().shape
        (4, 8)

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    layers: Mapping[str, LayerUpdate]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    base_model: str = ""
    bias: str = "none"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        frozen = {}
        for key, value in self.weights.items():
            frozen[key] = np.array(value)
            frozen[key].setflags(write=False)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "weights", MappingProxyType(frozen))
        object.__setattr__(self, "modules", tuple(self.modules))
        if not self.layers:
            raise ValueError("Received an adapter without layers; expected at least one.")
        for name, what in (("magnitude", "a magnitude (DoRA)"), ("bias", "a bias")):
            without = [p for p, x in self.layers.items() if getattr(x, name) is None]
            if 0 < len(without) < len(self.layers):
                raise ValueError(
                    f"Received an adapter of which some updates have {what}, and others have "
                    f"not: {', '.join(without[:10])}; expected all or none."
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str], **hub_options: Any) -> Adapter:
        """Read an adapter from a folder, or from the hub.

        Args:
            path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as
                ``save`` and PEFT write them; or "hf://user/repo" for one on the hub.
            **hub_options: For the hub: revision, cache_dir.

        Raises:
            FileNotFoundError: if there is no such folder, file or repository.
            ValueError: if a file is damaged, or needs what is not supported; the message
                names it. Nothing is ever unpickled.
            ImportError: if safetensors or huggingface_hub is needed and not installed.
        """
        from tfimm_lora.adapters.files import read
        from tfimm_lora.adapters.hub import download, is_hub_address

        if is_hub_address(path):
            return read(download(os.fspath(path), **hub_options))
        if hub_options:
            raise TypeError(
                f"Received {', '.join(hub_options)} with path={os.fspath(path)!r}; expected "
                "them only with a path on the hub, 'hf://user/repo'."
            )
        return read(path)

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write the adapter to a folder, as PEFT does, with a model card.

        Each file is replaced whole: if the process is killed at any moment, the old adapter
        or the new one is there.

        Args:
            path: The folder; created if missing.
            format: None (default) writes PEFT's format, or where it cannot express a layer
                (a standardised, grouped or depthwise convolution) an extension of it that
                PEFT refuses and ``Adapter.load`` reads. "peft" never writes the extension.

        Raises:
            ValueError: with format="peft", naming the layers that PEFT cannot express and
                why. Nothing is written.
        """
        from tfimm_lora.adapters.files import write

        write(self, path, format)

    def summary(self, model: Any = None) -> str:
        """A table of the layers: rank, scale, size and norm of the update.

        Args:
            model: The model that the adapter is of. If given, the table also has the norm of
                each update relative to that of the layer's frozen weight.

        Returns:
            Text. Its columns: the layer's module path; rank; scale; Frobenius norm of dW;
            that norm over the weight's; effective rank, the exponential of the entropy of
            the normalised singular values (Roy and Vetterli, "The effective rank", 2007);
            parameters. The last line sums up.
        """
        from tfimm_lora.adapters.summary import summary

        return summary(self, model)

    @property
    def size(self) -> int:
        """The bytes of all its arrays."""
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        factors = [array for x in self.layers.values() for array in x.arrays().values()]
        return factors + list(self.weights.values())

    @property
    def use_dora(self) -> bool:
        """Whether its updates have magnitudes."""
        return any(x.magnitude is not None for x in self.layers.values())

    @property
    def branch_bias(self) -> bool:
        """Whether its updates have biases of their own (PEFT's lora_bias)."""
        return any(x.bias is not None for x in self.layers.values())

    def not_in_peft(self) -> dict[str, str]:
        """The layers that PEFT cannot express, with the reason."""
        return {
            path: OWN_KINDS[update.kind]
            for path, update in self.layers.items()
            if update.kind in OWN_KINDS
        }

    def __reduce__(self) -> tuple[Any, ...]:
        plain = (dict(self.layers), dict(self.weights))
        return Adapter, (*plain, self.modules, self.base_model, self.bias, self.dropout)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = (
            (dict(x.layers), x.modules, x.base_model, x.bias, x.dropout, set(x.weights))
            for x in (self, other)
        )
        return mine == theirs and all(
            _same(value, other.weights[key]) for key, value in self.weights.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        ranks = sorted({update.rank for update in self.layers.values()})
        more = f", {len(self.weights)} weights trained whole" if self.weights else ""
        return (
            f"Adapter({len(self.layers)} layers of rank {', '.join(map(str, ranks))}{more}, "
            f"base_model={self.base_model!r})"
        )


def effective_rank(singular_values: np.ndarray) -> float:
    """exp(-sum p log p) of p, the singular values over their sum; 0 for no update."""
    total = singular_values.sum()
    if not total:
        return 0.0
    share = singular_values / total
    share = share[share > 0]
    return math.exp(-float((share * np.log(share)).sum()))


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)
