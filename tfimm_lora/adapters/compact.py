"""``compact_adapter``: an adapter without the components that do nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.module_names import ModuleNames
from tfimm_lora.adapters.save import adapter_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.merge import lora_layers

_FIELDS = ("a", "b", "scale", "kind", "qkv")


def compact_adapter(model: Any, base_model: str | None = None) -> Adapter:
    """The adapter of a model, with each layer at the rank that it uses.

    A component (column i of A, row i of B) that is zero in A or in B adds nothing and is
    dropped, as ``RankAllocator`` leaves them. What is left keeps its scale, so the outputs
    are the same. A layer without a component is left out, or where it holds something else
    too (a trained bias) is kept with one of zeros. Parts of a fused projection (``lora_qkv``)
    keep the rank of the part with the most, and layers that start from their kernel (PiSSA,
    OLoRA) all of their components: the start, which is taken off again, has every one.

    To have the smaller layers in the model itself, load the adapter into it:
    ``load_adapter(model, compact_adapter(model))``, and compile it again.

    Args:
        model: A built LoRA model, merged or not. It stays as it is.
        base_model: As in ``adapter_of``.

    Returns:
        A new adapter. Its file has each layer's rank in ``rank_pattern``.

    Raises:
        ValueError: if the model has no LoRA layers or is not built, or no layer has a
            component other than zero, as before training.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=4, lora_targets=["fc"])
        >>> b = np.array([[1, 1, 1], [0, 0, 0], [2, 0, 1], [0, 0, 0]], "float32")
        >>> _ = model.get_layer("fc").kernel_lora_b.assign(b)
        >>> lora.compact_adapter(model)
        Adapter(1 layers of rank 2, base_model='')

    Reference: Zhang et al., "AdaLoRA", arXiv:2303.10512, section 3.
    """
    adapter = adapter_of(model, base_model)
    names, layers = ModuleNames(model), lora_layers(model)
    alive = {names.modules[path]: live_components(layer) for path, layer in layers.items()}
    whole = {names.modules[path] for path, layer in layers.items() if has_initial_update(layer)}
    if not whole and not any(kept.any() for kept in alive.values()):
        raise ValueError(
            f"Received model '{model.name}', in whose adapter every component is zero; "
            "expected a trained model. Before training, save_adapter keeps all of it."
        )
    kept_layers = {}
    for module, update in adapter.layers.items():
        if module in whole:
            kept_layers[module] = update
        elif alive[module].any() or adapter.bias != "none" or _has_more(update):
            kept_layers[module] = _compact(update, alive[module])
    return dataclasses.replace(adapter, layers=kept_layers)


def has_initial_update(layer: LoRALayer) -> bool:
    """Whether a layer adds A B - A0 B0, less its initial update (PiSSA, OLoRA)."""
    return "kernel_lora_a0" in layer.__dict__


def live_components(layer: LoRALayer) -> np.ndarray:
    """Which components of a layer are not zero: (rank,), of fused parts (parts * rank,)."""
    values = layer.lora_values()
    a = values["kernel_lora_a"]
    b = np.moveaxis(values["kernel_lora_b"], layer._rank_axis_of_b(), -1)
    result: np.ndarray = (a != 0).reshape(-1, a.shape[-1]).any(axis=0) & (b != 0).reshape(
        -1, b.shape[-1]
    ).any(axis=0)
    return result


def _has_more(update: LayerUpdate) -> bool:
    """Whether an update holds something beside its factors."""
    names = [f.name for f in dataclasses.fields(update) if f.name not in _FIELDS]
    return any(getattr(update, name) is not None for name in names)


def _compact(update: LayerUpdate, alive: np.ndarray) -> LayerUpdate:
    """An update with the live components only, and as many of zeros as it needs."""
    parts = len(update.qkv[0]) if update.qkv else 1
    grouped = alive.reshape(parts, -1)
    rank = max(1, int(grouped.sum(axis=1).max()))
    # The live ones first, in their order; then zeros, up to the rank.
    order = np.argsort(~grouped, axis=1, kind="stable")[:, :rank]
    order.sort(axis=1)
    chosen = (order + grouped.shape[1] * np.arange(parts)[:, None]).reshape(-1)
    # A kernel for each position has these components at each of them.
    positions = update.rank // alive.size
    chosen = (chosen + alive.size * np.arange(positions)[:, None]).reshape(-1)
    dead = ~np.tile(alive, positions)[chosen]
    a, b = update.a[chosen].copy(), update.b[:, chosen].copy()
    a[dead], b[:, dead] = 0, 0
    return dataclasses.replace(update, a=a, b=b)
