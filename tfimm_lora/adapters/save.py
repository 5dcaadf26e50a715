"""From a live model to an adapter: ``adapter_of`` and ``save_adapter``."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.module_names import ModuleNames, Weight, require_unique
from tfimm_lora.adapters.torch_layout import update_of
from tfimm_lora.backend import backend_of
from tfimm_lora.layer_paths import is_suffix
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.replaced_weights import replaced, shelved
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS


def adapter_of(model: Any, base_model: str | None = None) -> Adapter:
    """The adapter that a LoRA model holds: its factors and the weights trained whole.

    Args:
        model: A built LoRA model, merged or not. It stays as it is.
        base_model: What the adapter is of, for its file. Default: for a tfimm model the hub
            id of its weights in timm, or its name; else "".

    Raises:
        ValueError: if the model has no LoRA layers or is not built.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> lora.adapter_of(model)
        Adapter(1 layers of rank 2, base_model='')
    """
    found = lora_layers(model)
    for layer in found.values():
        layer._require_built("save")
    names = ModuleNames(model)
    layers = {names.modules[path]: update_of(layer) for path, layer in found.items()}
    modules, weights = trained_whole(model, names)
    outside = [w for w in weights if not any(_is_in(w.key, m) for m in modules)]
    in_lora = {w.key for w in outside if isinstance(w.wanted.layer, LoRALayer)}
    bias = "none" if not outside else "lora_only" if len(in_lora) == len(outside) else "all"
    config = model.__dict__.get("_lora_config")
    held = shelved(model)
    return Adapter(
        layers,
        {w.key: _value(w, held) for w in weights},
        modules,
        name_of(model) if base_model is None else base_model,
        bias,
        float(getattr(config, "lora_dropout", 0.0)),
    )


def save_adapter(
    model: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write the adapter of a LoRA model to a folder that PEFT and this package read.

    Args:
        model: A built LoRA model, merged or not.
        path: The folder; created if missing. An adapter in it is replaced, each file whole.
        format: None (default), or "peft" to refuse what PEFT cannot express; see
            ``Adapter.save``.
        base_model: As in ``adapter_of``.

    Raises:
        ImportError: if safetensors is not installed.
        ValueError: if the model has no LoRA layers or is not built; with format="peft", if
            it has layers that PEFT cannot express. Nothing is written.

    Example:
        >>> import tempfile, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> folder = tempfile.mkdtemp()
        >>> lora.save_adapter(model, folder)
        >>> lora.Adapter.load(folder) == lora.adapter_of(model)
        True
    """
    adapter_of(model, base_model).save(path, format)


def _value(weight: Weight, shelved: dict[str, Any]) -> Any:
    """The value of a weight in the adapter, also while that is disabled; 16 bits as 32."""
    value = shelved.get(weight.key)
    value = weight.value() if value is None else value
    return value.astype("float32") if value.dtype.itemsize < 4 else value


def trained_whole(model: Any, names: ModuleNames) -> tuple[tuple[str, ...], list[Weight]]:
    """The modules trained whole, and all weights that an adapter must hold beside factors."""
    roots = _roots(model, names)
    known = replaced(model)
    trainable = {id(v) for v in _trained_variables(model)}
    modules: dict[str, None] = {}
    weights = []
    for weight in names.weights:
        path = weight.path
        layer = weight.wanted.layer
        inside = any(path == r or path.startswith(r + "/") for r in roots)
        is_open = not isinstance(layer, (LoRALayer, FrozenLayer)) and layer is not model
        trained = id(weight.variable) in trainable or weight.key in known
        if not (inside or trained or (is_open and _is_trained(layer, trainable))):
            continue
        if inside or is_open or not _is_bias(layer, weight):
            modules[names.module_of(weight, roots)] = None
        weights.append(weight)
    require_unique([(weight.wanted.name, weight.key) for weight in weights], "weights")
    return tuple(sorted(modules)), weights


def _is_trained(layer: Any, trainable: set[int]) -> bool:
    """Whether a layer is trained whole: then its statistics belong to what it learned."""
    return any(id(v) in trainable for v in backend_of(layer).own_variables(layer))


def _is_bias(layer: Any, weight: Weight) -> bool:
    return backend_of(layer).is_bias_like(weight.variable)


def _roots(model: Any, names: ModuleNames) -> list[str]:
    """The paths of the layers that were asked to be trained whole, or replaced as such."""
    config = model.__dict__.get("_lora_config")
    if config is None:
        return []
    wanted = getattr(config, "lora_train_modules", ())
    roots = [path for path in names.layers if any(is_suffix(path, name) for name in wanted)]
    if getattr(config, "lora_train_classifier", None):
        roots += classifier_paths(model)
    return sorted(set(roots), key=len)


def _trained_variables(model: Any) -> list[Any]:
    """The variables that are trained, also of a model whose training is off at the moment."""
    backend = backend_of(model)
    found = []
    for _, layer in backend.walk(model):
        own = backend.trainable_own_variables(layer)
        if hasattr(layer, "_is_trained"):
            own = [v for v in own if layer._is_trained(v)]
        found += own
    return found


def _is_in(key: str, module: str) -> bool:
    return key.startswith(f"{module}.")


def name_of(model: Any) -> str:
    """What a model's adapters are of: the hub id of its weights in timm, its name, or ""."""
    name = getattr(getattr(model, "cfg", None), "name", "") or ""
    return f"timm/{CHECKPOINTS[name]}" if name in CHECKPOINTS else name
