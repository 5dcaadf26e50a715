"""``compact_adapter``: remove the components of an adapter that have no effect."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.save import adapter_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.zoo.weights.module_names import ModuleNames

_FIELDS = ("a", "b", "scale", "kind", "qkv")


def compact_adapter(model: Any, base_model: str | None = None) -> Adapter:
    """Return the adapter of a model, with the rank of each layer reduced to what it uses.

    A component (column i of A, row i of B) that is zero in A or in B has no effect and is
    dropped. ``RankAllocator`` sets components to zero in this way. The remaining ones keep
    their scale, so the outputs are the same. A layer without components is left out; if it
    has other values (a trained bias), it keeps one component of zeros. All blocks of a fused
    projection (``lora_qkv``) keep the rank of the block with the most components. Layers
    initialized from their kernel (PiSSA, OLoRA) keep all components, because the initial
    update that is subtracted uses every one.

    To make the layers of the model itself smaller, load the adapter into it:
    ``load_adapter(model, compact_adapter(model))``, and compile it again.

    Args:
        model: A built LoRA model, merged or not. It is not changed.
        base_model: As in ``adapter_of``.

    Returns:
        A new adapter. Its file has each layer's rank in ``rank_pattern``.

    Raises:
        ValueError: If the model has no LoRA layers or is not built, or if all components are
            zero, as before training; or if it has LoHa.

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
    if adapter.use_loha:
        raise ValueError(
            f"Received model '{model.name}' with LoHa, whose factors have no components that "
            "could be dropped one by one; expected LoRA. save_adapter saves it as it is."
        )
    names, layers = ModuleNames(model), lora_layers(model)
    alive = {names.modules[path]: live_components(layer) for path, layer in layers.items()}
    uncompacted = {
        names.modules[path] for path, layer in layers.items() if has_initial_update(layer)
    }
    if not uncompacted and not any(kept.any() for kept in alive.values()):
        raise ValueError(
            f"Received model '{model.name}', in whose adapter every component is zero; "
            "expected a trained model. Before training use save_adapter, which keeps all "
            "components."
        )
    kept_layers = {}
    for module, update in adapter.layers.items():
        if module in uncompacted:
            kept_layers[module] = update
        elif alive[module].any() or adapter.bias != "none" or _has_more(update):
            kept_layers[module] = _compact(update, alive[module])
    return dataclasses.replace(adapter, layers=kept_layers)


def has_initial_update(layer: LoRALayer) -> bool:
    """Whether the update of a layer is A B - A0 B0, with an initial update (PiSSA, OLoRA)."""
    return "kernel_lora_a0" in layer.__dict__


def live_components(layer: LoRALayer) -> np.ndarray:
    """Return which components of a layer are not zero.

    The shape is (rank,), or (blocks * rank,) for the blocks of a fused projection.
    """
    values = layer.lora_values()
    a = values["kernel_lora_a"]
    b = np.moveaxis(values["kernel_lora_b"], layer._rank_axis_of_b(), -1)
    result: np.ndarray = (a != 0).reshape(-1, a.shape[-1]).any(axis=0) & (b != 0).reshape(
        -1, b.shape[-1]
    ).any(axis=0)
    return result


def _has_more(update: LayerUpdate) -> bool:
    """Whether an update has values other than its factors."""
    names = [f.name for f in dataclasses.fields(update) if f.name not in _FIELDS]
    return any(getattr(update, name) is not None for name in names)


def _compact(update: LayerUpdate, alive: np.ndarray) -> LayerUpdate:
    """Return an update with its live components, and zeros if blocks need equal ranks."""
    blocks = len(update.qkv[0]) if update.qkv else 1
    grouped = alive.reshape(blocks, -1)
    rank = max(1, int(grouped.sum(axis=1).max()))
    # The live components first, in their order; then zeros, up to the rank.
    order = np.argsort(~grouped, axis=1, kind="stable")[:, :rank]
    order.sort(axis=1)
    chosen = (order + grouped.shape[1] * np.arange(blocks)[:, None]).reshape(-1)
    # A layer with a kernel for each position has these components at each position.
    positions = update.rank // alive.size
    chosen = (chosen + alive.size * np.arange(positions)[:, None]).reshape(-1)
    dead = ~np.tile(alive, positions)[chosen]
    a, b = update.a[chosen].copy(), update.b[:, chosen].copy()
    a[dead], b[:, dead] = 0, 0
    return dataclasses.replace(update, a=a, b=b)
