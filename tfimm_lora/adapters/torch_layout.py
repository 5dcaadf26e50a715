"""Between the values of an adapted layer and its update in an adapter, in torch's order.

With a and b the factors in Keras' order, and A and B those in torch's:

* dense: a (in, r), b (r, out); A (r, in), B (out, r).
* convolution: a (*size, in, r), b (r, out); A (r, in, *size), B (out, r, 1, ...).
* depthwise: a (kh kw, r), b (r, in multiplier); A (r, 1, kh, kw), B (in multiplier, r, 1, 1).
* embedding: a (vocabulary, r), b (r, width); A (r, vocabulary), B (width, r).
* einsum: the axes that are summed over as ``in``, those that are added as ``out``.

The two pairs of LoHa are converted alike. PEFT writes its A for a convolution as (r, in size).

Each kind of layer has its own conversion, ``factors_to_torch`` and its reverse. The blocks of a
fused projection, and the kernels side by side of an einsum layer, are written at a larger rank,
with a B that is zero outside of the blocks. That is exact, and PEFT can read it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
from tfimm_lora.config import LOHA_WEIGHT_NAMES, LayerSettings
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import (
    adapt_layer,
    kernel_variable,
    lora_class,
    restore_layer,
)
from tfimm_lora.layers.einsum_dense import positions_of
from tfimm_lora.layers.forward import Factors
from tfimm_lora.layers.loha import lora_factors
from tfimm_lora.layers.state import Values, original_class


class DoesNotFit(ValueError):
    """The update of an adapter does not fit a layer; the message says what differs."""


def kind_of(layer: Layer) -> str:
    """The kind of a layer's update, adapted or not; see ``LayerUpdate.kind``."""
    kind = sure_kind(layer)
    if kind is not None:
        return kind
    # Whether its call transforms the kernel shows only in the adapted layer.
    adapt_layer(layer, LayerSettings(lora_rank=1))
    try:
        return sure_kind(layer) or "conv"
    finally:
        restore_layer(layer)


def sure_kind(layer: Layer) -> str | None:
    """``kind_of`` as far as the class shows it: None for a convolution with a call of its own
    that is not adapted, which may standardise its kernel."""
    kind: str | None = _lora_class(layer).update_kind(layer)
    return kind


def kinds_agree(update: LayerUpdate, kind: str) -> bool:
    """Whether an update can be that of a layer of a kind.

    A 1x1 convolution is linear. The files of PEFT's LoHa do not tell linear layers and
    convolutions, with groups or without, apart.
    """
    if update.kind == kind:
        return True
    alike = {"linear", "conv", *(("grouped", "depthwise") if update.is_loha else ())}
    return {update.kind, kind} <= alike


def shapes_agree(
    update: LayerUpdate, expected: tuple[int, ...], given: tuple[int, ...]
) -> bool:
    """Whether the shape of an update, or of a factor, is that of a layer but for kernel sizes
    of 1. That of PEFT's LoHa may have the kernel sizes in the axis of the inputs."""
    if update.is_loha and len(given) == 2:
        return expected[0] == given[0] and math.prod(expected) == math.prod(given)
    return _without_ones(expected) == _without_ones(given)


def update_of(layer: Any) -> LayerUpdate:
    """The update of an adapted layer, whether it is merged at the moment or not."""
    values, settings = layer.lora_values(), layer.lora
    a, b = layer.factors_to_torch(*layer._widen(np, *_factors(layer, values)))
    a2 = b2 = None
    if settings.lora_use_loha:
        second = (values[name] for name in LOHA_WEIGHT_NAMES)
        a2, b2 = layer.factors_to_torch(*layer._widen(np, *second))
    blocks = (settings.lora_qkv, settings.lora_qkv_layout) if settings.lora_qkv else None
    magnitude, bias = None, values.get("kernel_lora_shift")
    if settings.lora_use_dora:
        offset = layer.outputs_to_torch(values["kernel_lora_magnitude"])
        magnitude = (_norms(layer, values["kernel"]) + offset).astype("float32")
    if bias is not None:
        bias = bias.reshape(-1)
    scale, kind = settings.lora_scale, kind_of(layer)
    return LayerUpdate(a, b, scale, kind, blocks, magnitude, bias, a2, b2)


def values_for(layer: Any, update: LayerUpdate) -> Values:
    """The values of an adapted layer's variables with which it computes an update.

    The magnitude is left to ``magnitude_for``, since it depends on the kernel.

    The layer keeps its scale; if that of the update differs, b includes the ratio. A layer
    whose initial update is subtracted takes an update of twice its rank: its own, and the
    initial one.

    Raises:
        DoesNotFit: if rank, shape or kind differ, or only one has a magnitude or a bias.
    """
    settings = layer.lora
    for name, what, has in (
        ("magnitude", "a magnitude", settings.lora_use_dora),
        ("bias", "a bias", settings.lora_bias),
        ("a2", "a second pair of factors (LoHa)", settings.lora_use_loha),
    ):
        if (getattr(update, name) is not None) != has:
            which = ("the layer", "the update") if has else ("the update", "the layer")
            raise DoesNotFit(f"differs in variant: {which[0]} has {what}, {which[1]} none")
    a, b = _factors_for(layer, update)
    shapes = _shapes(layer)
    values = {"kernel_lora_a": a, "kernel_lora_b": b}
    if update.is_loha:
        given = update.pairs()[1]
        second = _in_layer_order(layer, update, given, (a.shape, b.shape))
        values.update(zip(LOHA_WEIGHT_NAMES, second))
    if "kernel_lora_a0" in shapes:
        (a, b), (a0, b0) = layer._halves(a, b)
        values = {"kernel_lora_a": a, "kernel_lora_b": b}
        values.update(kernel_lora_a0=a0, kernel_lora_b0=-b0)
    if update.bias is not None:
        scale = settings.lora_scale
        shift = update.bias * np.float64(update.scale / scale if scale else 0.0)
        values["kernel_lora_shift"] = shift.astype("float32")
    return {name: x.reshape(shapes[name]) for name, x in values.items()}


def magnitude_for(layer: Any, update: LayerUpdate) -> Values:
    """The value of the variable d = m - |W| with which a layer has an update's magnitude m.

    The kernel W must have its final value: what an adapter replaces or restores comes first.
    """
    if update.magnitude is None:
        return {}
    norms = _norms(layer, layer.lora_values()["kernel"])
    offset = (update.magnitude.astype("float64") - norms).astype("float32")
    shape = _shapes(layer)["kernel_lora_magnitude"]
    return {"kernel_lora_magnitude": layer.outputs_from_torch(offset, shape).reshape(shape)}


def own_factors(layer: Any, update: LayerUpdate) -> Factors:
    """a and b of an update at its own rank, in the order of an adapted layer, whose blocks are
    not adapted separately. The scale and the gain of DoRA are in b. With LoHa they are those
    of the LoRA that it is equal to.

    Raises:
        DoesNotFit: if shape or kind differ.
    """
    rank = update.rank
    if update.kind == "batched":
        rank //= positions_of(layer)
    shapes = layer._factor_shapes(tuple(layer._kernel_variable.shape), rank)
    b = update.scale * update.b.astype("float64")
    if update.magnitude is not None:
        b = gains(layer, update).reshape(-1, *[1] * (b.ndim - 1)) * b
    pairs = [(update.a, b), *update.pairs()[1:]]
    own = [_in_layer_order(layer, update, pair, shapes) for pair in pairs]
    if len(own) == 1:
        return own[0]
    axis_of_b = layer._rank_axis_of_b()
    return lora_factors(np, own, len(shapes[0]) - 1, axis_of_b, update.separate_blocks())


def gains(layer: Any, update: LayerUpdate) -> np.ndarray:
    """DoRA's factor m / |W + dW| of each output, in torch's order; 1 where W + dW is zero."""
    assert update.magnitude is not None
    adapted = base_kernel(layer).reshape(update.shape) + update.delta()
    norms = np.linalg.norm(adapted.reshape(len(adapted), -1), axis=1)
    dead = norms == 0
    found: np.ndarray = np.where(dead, 1.0, update.magnitude / np.where(dead, 1.0, norms))
    return found


def kernel_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's kernel in torch's order, whether it is adapted or not."""
    given = tuple(kernel_variable(layer).shape)
    shape: tuple[int, ...] = _lora_class(layer).torch_kernel_shape(layer, given)
    return shape


def kernel_in_torch_order(layer: Layer, kernel: np.ndarray) -> np.ndarray:
    """The value of a layer's kernel in the shape of ``kernel_shape``."""
    turned: np.ndarray = _lora_class(layer).kernel_to_torch(layer, kernel)
    return turned


def branch_bias_refusal(layer: Layer) -> str | None:
    """Why the branch of a layer cannot have a bias, or None."""
    cls = _lora_class(layer)
    reason: str | None = cls._branch_refusal(layer) or cls._bias_refusal(layer)
    return reason


def can_have_dropout(layer: Layer) -> bool:
    """Whether the branch of a layer can have dropout."""
    return _lora_class(layer)._branch_refusal(layer) is None


def base_kernel(layer: Layer) -> np.ndarray:
    """The frozen kernel of a layer, adapted or not, in torch's order and in float64."""
    if isinstance(layer, LoRALayer):
        kernel = layer.lora_values()["kernel"]
    else:
        kernel = backend_of(layer).to_numpy(kernel_variable(layer))
    return kernel_in_torch_order(layer, kernel.astype("float64"))


def weight_norm(layer: Layer) -> float:
    """The Frobenius norm of a layer's frozen kernel."""
    return float(np.linalg.norm(base_kernel(layer)))


def _lora_class(layer: Layer) -> Any:
    """The LoRA class of a layer, adapted or not."""
    return lora_class(original_class(type(layer)))


def _shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in layer._lora_variables().items()}


def _factors(layer: Any, values: Values) -> Factors:
    """a and b of all that a layer adds to its kernel, less the initial update."""
    factors: Factors = (values["kernel_lora_a"], values["kernel_lora_b"])
    if "kernel_lora_a0" not in values:
        return factors
    initial = (values["kernel_lora_a0"], -values["kernel_lora_b0"])
    both: Factors = layer._side_by_side(np, factors, initial)
    return both


def _factors_for(layer: Any, update: LayerUpdate) -> Factors:
    """a and b of an update in the order and with the scale of a layer."""
    scale = layer.lora.lora_scale
    zeros: Values = {name: np.zeros(x, "float32") for name, x in _shapes(layer).items()}
    own = _factors(layer, zeros)
    b = update.b
    if scale != update.scale:
        if not scale:
            raise DoesNotFit("has a scale, but the layer's scale is 0")
        b = b * np.float32(update.scale / scale)
    return _in_layer_order(layer, update, (update.a, b), (own[0].shape, own[1].shape))


def _in_layer_order(
    layer: Any, update: LayerUpdate, given: Factors, shapes: tuple[Any, Any]
) -> Factors:
    """A pair of factors of an update in the order of a layer.

    Args:
        layer: The adapted layer.
        update: The update.
        given: Its a and b, or multiples of them.
        shapes: The shapes of a and b in the layer.

    Raises:
        DoesNotFit: if shape or kind differ.
    """
    kind = kind_of(layer)
    if not kinds_agree(update, kind):
        raise DoesNotFit(f"is of the kind {update.kind!r}, expected {kind!r}")
    zeros = (np.zeros(shape, "float32") for shape in shapes)
    expected = layer.factors_to_torch(*layer._widen(np, *zeros))
    if not all(shapes_agree(update, x.shape, y.shape) for x, y in zip(expected, given)):
        shape_a, shape_b = (x.shape for x in expected)
        raise DoesNotFit(
            f"has A {update.a.shape} and B {update.b.shape}, expected {shape_a} and {shape_b}"
        )
    try:
        factors = layer.factors_from_torch(
            *(x.reshape(like.shape) for x, like in zip(given, expected))
        )
    except ValueError as error:
        raise DoesNotFit(str(error)) from error
    a, b = (x.reshape(shape).astype("float32") for x, shape in zip(factors, shapes))
    return a, b


def _norms(layer: Layer, kernel: np.ndarray) -> np.ndarray:
    """The norms of a kernel's columns in the order of torch's outputs, in float64."""
    turned = kernel_in_torch_order(layer, kernel.astype("float64"))
    norms: np.ndarray = np.linalg.norm(turned.reshape(len(turned), -1), axis=1)
    return norms


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    """A shape without kernel sizes of 1."""
    return [*shape[:2], *(size for size in shape[2:] if size != 1)]
