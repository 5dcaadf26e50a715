"""Between the factors of a Keras layer and those of an adapter, which are in torch's order.

With d the kernel's update, a and b in Keras' order, A and B in torch's:

* dense: a (in, r), b (r, out); A (r, in), B (out, r).
* convolution: a (*size, in, r), b (r, out); A (r, in, *size), B (out, r, 1, ...).
* depthwise: a (kh kw, r), b (r, in multiplier); A (r, 1, kh, kw), B (in multiplier, r, 1, 1).
* embedding: a (vocabulary, r), b (r, width); A (r, vocabulary), B (width, r).
* einsum: the axes summed over as ``in``, those added as ``out``. Axes that input, kernel and
  output share give one small product each; they are written as one with blocks.

Parts of a fused projection and shared axes are written out at a wider rank, with a B that is
zero outside of its blocks: exact, and what everybody else can read.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tfimm_lora.adapters.layer_update import OWN_KINDS, LayerUpdate
from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer, has_keras_call, layer_settings
from tfimm_lora.layers.conv import ConvUpdate, DepthwiseConvUpdate
from tfimm_lora.layers.conversion import adapt_layer, lora_class, restore_layer
from tfimm_lora.layers.einsum_dense import EinsumDenseUpdate, EinsumProduct
from tfimm_lora.layers.embedding import EmbeddingUpdate
from tfimm_lora.layers.qkv import selection


class DoesNotFit(ValueError):
    """The update of an adapter is not one of this layer; the message says what differs."""


def kind_of(layer: Any) -> str:
    """The kind of a layer's update, adapted or not; see ``LayerUpdate.kind``."""
    kind = sure_kind(layer)
    if kind is not None:
        return kind
    # What its call does with the kernel shows in the adapted layer. It stays as it is.
    adapt_layer(layer, layer_settings(backend_of(layer), {"lora_rank": 1}))
    try:
        return sure_kind(layer) or "conv"
    finally:
        restore_layer(layer)


def sure_kind(layer: Any) -> str | None:
    """``kind_of`` as far as the class tells: None for a convolution with a call of its own
    that is not adapted, which may standardise its kernel or not."""
    made = lora_class(plain_class(layer))
    if issubclass(made, EmbeddingUpdate):
        return "embedding"
    if issubclass(made, DepthwiseConvUpdate):
        return "depthwise"
    if issubclass(made, ConvUpdate):
        if layer.groups > 1:
            return "grouped"
        if isinstance(layer, LoRALayer):
            return "standardised" if layer._lora_state.kernel_transformed else "conv"
        return "conv" if has_keras_call(made) else None
    if issubclass(made, EinsumDenseUpdate) and _shared_sizes(layer):
        return "batched"
    return "linear"


def plain_class(layer: Any) -> type:
    """The class of a layer but for what LoRA made of it."""
    return next(c for c in type(layer).__mro__ if not c.__module__.startswith("tfimm_lora"))


def kinds_agree(one: str, other: str) -> bool:
    """Whether an update of one kind can be that of a layer of another."""
    return one == other or {one, other} == {"linear", "conv"}  # a 1x1 convolution is linear


def update_of(layer: Any) -> LayerUpdate:
    """The update of an adapted layer, whether it is merged at the moment or not."""
    values = layer.lora_values()
    a, b = _to_torch(layer, *_whole(layer, values))
    settings = layer.lora
    qkv = (settings.qkv, settings.qkv_layout) if settings.qkv else None
    magnitude, bias = None, values.get("kernel_lora_shift")
    if settings.use_dora:
        offset = _outputs_to_torch(layer, values["kernel_lora_magnitude"])
        magnitude = (_norms(layer, values["kernel"]) + offset).astype("float32")
    if bias is not None:
        bias = bias.reshape(-1)
    return LayerUpdate(a, b, settings.scale, kind_of(layer), qkv, magnitude, bias)


def values_for(layer: Any, update: LayerUpdate) -> dict[str, np.ndarray]:
    """The values of an adapted layer's variables with which it computes what an update says.

    The layer keeps its scale; where that of the update differs, b takes up the difference.
    A layer whose start is taken off again takes an update of twice its rank: its own, and
    the start.

    Raises:
        DoesNotFit: if rank, shape or kind differ, or one has a magnitude or a bias alone.
    """
    settings = layer.lora
    for name, has in (("magnitude", settings.use_dora), ("bias", settings.branch_bias)):
        if (getattr(update, name) is not None) != has:
            which = ("the layer", "the update") if has else ("the update", "the layer")
            raise DoesNotFit(f"differs in variant: {which[0]} has a {name}, {which[1]} none")
    a, b = _factors_for(layer, update)
    shapes = _shapes(layer)
    if "kernel_lora_a0" in shapes:
        (a, b), (a0, b0) = layer._apart(np, (a, b))
        values = {"kernel_lora_a": a, "kernel_lora_b": b}
        values.update(kernel_lora_a0=a0, kernel_lora_b0=-b0)
    else:
        values = {"kernel_lora_a": a, "kernel_lora_b": b}
    if update.magnitude is not None:
        norms = _norms(layer, layer.lora_values()["kernel"])
        offset = update.magnitude.astype("float64") - norms
        values["kernel_lora_magnitude"] = _outputs_to_keras(layer, offset.astype("float32"))
    if update.bias is not None:
        shift = update.bias * np.float64(
            update.scale / settings.scale if settings.scale else 0.0
        )
        values["kernel_lora_shift"] = shift.astype("float32")
    return {name: x.reshape(shapes[name]) for name, x in values.items()}


def _shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in layer._lora_variables().items()}


def _whole(layer: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """a and b of all that a layer adds to its kernel, less what it takes off."""
    factors = (values["kernel_lora_a"], values["kernel_lora_b"])
    if "kernel_lora_a0" not in values:
        return factors
    start = (values["kernel_lora_a0"], -values["kernel_lora_b0"])
    return layer._side_by_side(np, factors, start)


def _factors_for(layer: Any, update: LayerUpdate) -> tuple[np.ndarray, np.ndarray]:
    """a and b of an update in the order and with the scale of a layer."""
    if not kinds_agree(update.kind, kind_of(layer)):
        raise DoesNotFit(f"is of the kind {update.kind!r}, expected {kind_of(layer)!r}")
    empty: Any = {name: np.zeros(shape, "float32") for name, shape in _shapes(layer).items()}
    plain = _whole(layer, empty)
    zeros = _to_torch(layer, *plain)
    given = tuple(_full(x.shape) for x in (update.a, update.b))
    if tuple(_full(x.shape) for x in zeros) != given:
        wanted_a, wanted_b = (x.shape for x in zeros)
        raise DoesNotFit(
            f"has A {update.a.shape} and B {update.b.shape}, expected {wanted_a} and {wanted_b}"
        )
    a, b = _to_keras(layer, update.a.reshape(zeros[0].shape), update.b.reshape(zeros[1].shape))
    if layer.lora.scale != update.scale:
        if not layer.lora.scale:
            raise DoesNotFit("has a scale, but the layer's scale is 0")
        b = b * np.float32(update.scale / layer.lora.scale)
    return (
        a.reshape(plain[0].shape).astype("float32"),
        b.reshape(plain[1].shape).astype("float32"),
    )


def _norms(layer: Any, kernel: np.ndarray) -> np.ndarray:
    """The norms of a kernel's columns in the order of torch's outputs, in float64."""
    turned = kernel_in_torch_order(layer, kernel.astype("float64"))
    return np.linalg.norm(turned.reshape(len(turned), -1), axis=1)


def _outputs_to_torch(layer: Any, values: np.ndarray) -> np.ndarray:
    """A value for each output of the kernel, (out,), in the order of B's first axis."""
    if isinstance(layer, EinsumDenseUpdate):
        kept, ordered = _output_axes(layer)
        values = np.einsum(f"{kept}->{ordered}", values)
    return values.reshape(-1)


def _outputs_to_keras(layer: Any, values: np.ndarray) -> np.ndarray:
    """The reverse of ``_outputs_to_torch``."""
    shape = _shapes(layer)["kernel_lora_magnitude"]
    if not isinstance(layer, EinsumDenseUpdate):
        return values.reshape(shape)
    kept, ordered = _output_axes(layer)
    sizes = dict(zip(kept, shape))
    return np.einsum(f"{ordered}->{kept}", values.reshape([sizes[c] for c in ordered]))


def _output_axes(layer: Any) -> tuple[str, str]:
    """The axes of an einsum kernel that are in the output: in the kernel's order, and in
    that of B, the shared ones first."""
    product = EinsumProduct(backend_of(layer).ops, layer.equation)
    shared, _, added = product.b.partition(product.a[-1])
    return "".join(c for c in product.kernel if c in shared + added), shared + added


def columns_for(layer: Any, update: LayerUpdate) -> tuple[np.ndarray, np.ndarray]:
    """a and b of an update at its own rank, with its scale in b, for the plain product of an
    adapted layer (which does not take fused projections apart).

    Raises:
        DoesNotFit: if the layer's product cannot be split in two narrow ones.
    """
    if update.magnitude is not None or update.bias is not None:
        what = "a magnitude (DoRA)" if update.magnitude is not None else "a bias"
        raise DoesNotFit(f"has {what}, which belongs to the layer and not to an example")
    if update.kind in OWN_KINDS or kind_of(layer) in OWN_KINDS:
        kind = update.kind if update.kind in OWN_KINDS else kind_of(layer)
        raise DoesNotFit(f"is {kind}, and so has no two narrow products")
    if not isinstance(layer, ConvUpdate) and not has_keras_call(type(layer)):
        raise DoesNotFit("is of a class with a call of its own, which has no place for that")
    a, b = update.a, update.scale * update.b.reshape(update.b.shape[:2])
    if isinstance(layer, ConvUpdate):
        window = tuple(layer._kernel_variable.shape)[:-2]
        a = np.moveaxis(a.reshape(*a.shape[:2], *window), (0, 1), (-1, -2))
        return a.astype("float32"), b.T.astype("float32")
    a, b = a.reshape(a.shape[0], -1).T, b.T
    if isinstance(layer, EinsumDenseUpdate):
        kernel = tuple(layer._kernel_variable.shape)
        shapes = layer._product().factor_shapes(kernel, update.rank)
        a, b = a.reshape(shapes[0]), b.reshape(shapes[1])
    return a.astype("float32"), b.astype("float32")


def kernel_shape(layer: Any) -> tuple[int, ...]:
    """The shape of a layer's kernel in torch's order, whether it is adapted or not."""
    backend = backend_of(layer)
    base = lora_class(type(layer))
    kernel = layer.__dict__[backend.kernel_attributes[base._kernel_role]]  # type: ignore[attr-defined]
    shape = tuple(kernel.shape)
    if issubclass(base, DepthwiseConvUpdate):
        return (shape[2] * shape[3], 1, *shape[:2])
    if issubclass(base, ConvUpdate):
        return (shape[-1], shape[-2], *shape[:-2])
    if issubclass(base, EinsumDenseUpdate):
        product = EinsumProduct(backend.ops, layer.equation)
        a, b = product.factor_shapes(shape, 1)
        shared = math.prod(a[: product.b.index(product.a[-1])])
        return (math.prod(b), math.prod(a) // shared)
    return tuple(reversed(shape))


def kernel_in_torch_order(layer: Any, kernel: np.ndarray) -> np.ndarray:
    """The value of a layer's kernel in the shape that ``kernel_shape`` gives."""
    base = lora_class(type(layer))
    if issubclass(base, DepthwiseConvUpdate):
        return kernel.transpose(2, 3, 0, 1).reshape(kernel_shape(layer))
    if issubclass(base, ConvUpdate):
        return np.moveaxis(kernel, (-1, -2), (0, 1))
    if issubclass(base, EinsumDenseUpdate):
        product = EinsumProduct(backend_of(layer).ops, layer.equation)
        added, summed = product.b.partition(product.a[-1])[2], product.a[:-1]
        turned = np.einsum(f"{product.kernel}->{added}{summed}", kernel)
        return turned.reshape(kernel_shape(layer))
    return kernel.T


def moves_only_its_parts(update: LayerUpdate) -> bool:
    """Whether an update is zero outside of the parts of a projection that it names."""
    if update.qkv is None or update.b.ndim != 2:
        return False
    chosen, layout = update.qkv
    mask = selection(chosen, layout)
    if not mask.size or update.rank % len(chosen) or update.b.shape[0] % len(layout):
        return False
    rank, width = update.rank // len(chosen), update.b.shape[0] // len(layout)
    blocks = update.b.reshape(len(layout), width, len(chosen), rank)
    return not (blocks * (1 - mask.T)[:, None, :, None]).any()


def _full(shape: tuple[int, ...]) -> list[int]:
    """A shape but for axes of size one behind the second, as linear against 1x1 has."""
    return [*shape[:2], *(size for size in shape[2:] if size != 1)]


def _to_torch(layer: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(layer, DepthwiseConvUpdate):
        size = tuple(layer._kernel_variable.shape)[:2]
        return a.T.reshape(-1, 1, *size), b.T.reshape(*b.T.shape, 1, 1)
    if isinstance(layer, ConvUpdate):
        turned = np.moveaxis(a, (-1, -2), (0, 1))
        return turned, b.T.reshape(*b.T.shape, *(1 for _ in a.shape[:-2]))
    if isinstance(layer, EinsumDenseUpdate):
        blocks_a, blocks_b = _einsum_blocks(layer, a, b)
        return _stacked(blocks_a), _block_diagonal(blocks_b)
    if layer.lora.qkv:
        return a.T, _widened(layer, b).T
    return a.T, b.T


def _to_keras(layer: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(layer, DepthwiseConvUpdate):
        return a.reshape(a.shape[0], -1).T, b.reshape(b.shape[:2]).T
    if isinstance(layer, ConvUpdate):
        return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T
    if isinstance(layer, EinsumDenseUpdate):
        return _from_einsum_blocks(layer, a, b)
    if layer.lora.qkv:
        return a.T, _narrowed(layer, b.T)
    return a.T, b.T


# -- parts of a fused projection ------------------------------------------------------------


def _widened(layer: Any, b: np.ndarray) -> np.ndarray:
    """b of the chosen parts, (p r, d), as that of the whole kernel, (p r, n d)."""
    chosen = selection(layer.lora.qkv, layer.lora.qkv_layout)
    stacked = b.reshape(len(chosen), -1, b.shape[1])
    return np.einsum("prd,pn->prnd", stacked, chosen).reshape(b.shape[0], -1)


def _narrowed(layer: Any, wide: np.ndarray) -> np.ndarray:
    """The reverse of ``_widened``."""
    chosen = selection(layer.lora.qkv, layer.lora.qkv_layout)
    parts, count = chosen.shape
    blocks = wide.reshape(parts, wide.shape[0] // parts, count, -1)
    narrow = np.einsum("prnd,pn->prd", blocks, chosen).reshape(wide.shape[0], -1)
    if not np.array_equal(_widened(layer, narrow), wide):
        raise DoesNotFit(
            f"moves more than the parts {layer.lora.qkv!r} of {layer.lora.qkv_layout!r}, "
            "which the layer adapts each by itself"
        )
    return narrow


# -- einsum ---------------------------------------------------------------------------------


def _shared_sizes(layer: Any) -> tuple[int, ...]:
    """The sizes of the axes that input, kernel and output share."""
    product = EinsumProduct(backend_of(layer).ops, layer.equation)
    kernel = layer.__dict__[backend_of(layer).kernel_attributes["kernel"]]
    sizes = dict(zip(product.kernel, tuple(kernel.shape)))
    return tuple(sizes[c] for c in product.b[: product.b.index(product.a[-1])])


def positions(layer: Any) -> int:
    """How many kernels an einsum layer with shared axes has: one for each position."""
    return math.prod(_shared_sizes(layer))


def _einsum_blocks(layer: Any, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A (shared, r, in) and B (shared, out, r), with all axes of a kind made one."""
    shared, rank = math.prod(_shared_sizes(layer)), a.shape[-1]
    blocks_a = a.reshape(shared, -1, rank).transpose(0, 2, 1)
    return blocks_a, b.reshape(shared, rank, -1).transpose(0, 2, 1)


def _from_einsum_blocks(
    layer: Any, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    shared = math.prod(_shared_sizes(layer))
    blocks_a = a.reshape(shared, a.shape[0] // shared, -1)
    out, rank = b.shape[0] // shared, b.shape[1] // shared
    blocks = b.reshape(shared, out, shared, rank)
    blocks_b = blocks[np.arange(shared), :, np.arange(shared)]
    if not np.array_equal(_block_diagonal(blocks_b), b):
        raise DoesNotFit("mixes positions, each of which has a kernel of its own")
    return blocks_a.transpose(0, 2, 1), blocks_b.transpose(0, 2, 1)


def _stacked(blocks: np.ndarray) -> np.ndarray:
    return blocks.reshape(-1, blocks.shape[-1])


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, out, rank = blocks.shape
    wide = np.zeros((count, out, count, rank), blocks.dtype)
    wide[np.arange(count), :, np.arange(count)] = blocks
    return wide.reshape(count * out, count * rank)


def weight_norm(layer: Any) -> float:
    """The Frobenius norm of a layer's frozen kernel."""
    kernel = layer.lora_values()["kernel"] if isinstance(layer, LoRALayer) else None
    if kernel is None:
        backend = backend_of(layer)
        kernel = max(map(backend.to_numpy, backend.own_variables(layer)), key=np.size)
    return float(np.linalg.norm(kernel.astype("float64")))
