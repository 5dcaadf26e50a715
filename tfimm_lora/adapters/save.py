"""``adapter_of`` and ``save_adapter``: from a live model to an adapter."""

from __future__ import annotations

import os
import warnings
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.model_names import check_library, in_library
from tfimm_lora.adapters.torch_layout import update_of
from tfimm_lora.backend import backend_of
from tfimm_lora.layer_paths import is_suffix
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.model.changed_statistics import changed_statistics
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import (
    base_name,
    config_of,
    model_state,
    random_weights,
    recorded_task,
    saves_timm_names,
)
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS
from tfimm_lora.zoo.weights.module_names import ModelWeight, ModuleNames, require_unique


def adapter_of(model: Any, base_model: str | None = None) -> Adapter:
    """Return the adapter of a LoRA model: its factors and its fully trained weights.

    Args:
        model: A built LoRA model, merged or not. It is not changed.
        base_model: The name of the base model, for the adapter's file. Default: the origin of
            its weights, for a tfimm model the hub id of its weights in timm, or "NAME (random
            weights)"; otherwise "".

    Returns:
        The adapter.

    Raises:
        ValueError: If the model has no LoRA layers or is not built.

    Warns:
        UserWarning: If variables that are not trained changed since LoRA was injected, and are
            not in the adapter.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> lora.adapter_of(model)
        Adapter(1 layers of rank 2, base_model='')
    """
    layers = lora_layers(model)
    for layer in layers.values():
        layer._require_built("save")
    names = ModuleNames(model)
    updates = {names.modules[path]: update_of(layer) for path, layer in layers.items()}
    modules, weights = fully_trained(names)
    outside = [w for w in weights if not any(w.key.startswith(f"{m}.") for m in modules)]
    of_lora_layers = [w for w in outside if isinstance(w.layer, LoRALayer)]
    if not outside:
        bias = "none"
    else:
        bias = "lora_only" if len(of_lora_layers) == len(outside) else "all"
    _warn_of_statistics(model, {id(weight.variable) for weight in weights})
    config, disabled_values = config_of(model), model_state(model).while_disabled
    return Adapter(
        updates,
        {weight.key: _value(weight, disabled_values) for weight in weights},
        modules,
        base_model_name(model) if base_model is None else base_model,
        bias,
        float(getattr(config, "lora_dropout", 0.0)),
        task=recorded_task(model),
    )


def save_adapter(
    model: Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    base_model: str | None = None,
    names: str | None = None,
    dialect: str | None = None,
    prefix: str | None = None,
) -> None:
    """Save the adapter of a LoRA model to a folder, in PEFT's format.

    With ``names`` the layers get the names of another library, so that its models can load
    the adapter with PEFT. The families are listed in docs/reference/names.md.

    Args:
        model: A built LoRA model, merged or not.
        path: The folder; created if missing. An adapter in it is replaced, each file
            atomically.
        format: None (default), or "peft" to refuse layers that PEFT cannot express; see
            ``Adapter.save``.
        base_model: As in ``adapter_of``.
        names: "timm", "transformers", "keras_hub" or "applications". None (default) means
            timm's names for a model that was created by its timm name, and otherwise the
            paths of the layers.
        dialect: For transformers, the major version that will load the adapter: "v5" (default)
            or "v4".
        prefix: What comes before the names of the backbone. Default: as in the library's model
            with a classifier, for example "vit." for ViTForImageClassification. "" is for a
            bare backbone (AutoModel).

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the model has no LoRA layers or is not built; with format="peft", if it
            has layers that PEFT cannot express; with names, if the library does not have them,
            or a layer has no name there. Nothing is written.

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
    check_library(names, dialect, prefix)
    if names is None:
        adapter_to_save(model, base_model).save(path, format)
    else:
        adapter = adapter_of(model, base_model)
        in_library(ModuleNames(model), adapter, names, dialect, prefix).save(path, format)


def adapter_to_save(model: Any, base_model: str | None = None) -> Adapter:
    """Return the adapter of a model with the names that files have by default.

    They are timm's names for a model that was created by its timm name.

    Args:
        model, base_model: As for ``adapter_of``.

    Warns:
        UserWarning: If not all layers have a name in timm. The paths are used then.
    """
    adapter = adapter_of(model, base_model)
    if not saves_timm_names(model):
        return adapter
    try:
        return in_library(ModuleNames(model), adapter, "timm", None, None)
    except ValueError as error:
        warnings.warn(
            f"The adapter of model '{model.name}' is saved with the paths of its layers, since "
            f"not all of them have a name in timm. {error}",
            stacklevel=3,
        )
        return adapter


def fully_trained(names: ModuleNames) -> tuple[tuple[str, ...], list[ModelWeight]]:
    """Return the fully trained modules, and all weights that an adapter must hold."""
    model = names.model
    roots = _fully_trained_paths(names)
    replaced_keys = model_state(model).replaced
    trainable = {id(v) for v in _trained_variables(model)}
    modules: set[str] = set()
    weights = []
    for weight in names.weights:
        path, layer = weight.path, weight.layer
        inside = any(path == root or path.startswith(root + "/") for root in roots)
        is_open = not isinstance(layer, (LoRALayer, FrozenLayer)) and layer is not model
        trained = id(weight.variable) in trainable or weight.key in replaced_keys
        if not (inside or trained or (is_open and _is_trained(layer, trainable))):
            continue
        if inside or is_open or not weight.is_bias():
            modules.add(names.module_of(weight, roots))
        weights.append(weight)
    require_unique([(weight.target.name, weight.key) for weight in weights], "weights")
    return tuple(sorted(modules)), weights


def _warn_of_statistics(model: Any, held: set[int]) -> None:
    """Warn if variables that are not trained changed, and the adapter does not hold them."""
    changed = changed_statistics(model, held)
    if changed:
        warnings.warn(
            f"The variables {', '.join(changed[:10])} of model '{model.name}' are not trained, "
            "but changed after LoRA was injected. The adapter does not hold them, so a model "
            "with the adapter will differ. Name their layers in lora_train_modules, which "
            "trains and saves them as a whole.",
            stacklevel=3,
        )


def base_model_name(model: Any) -> str:
    """Return the origin of a model's weights, for the files of its adapters.

    It is the recorded origin, if the package loaded or created the weights. For other models of
    tfimm it is the hub id of the name's weights in timm, or the name; but never if the weights
    look random.
    """
    recorded = base_name(model)
    if recorded is not None:
        return recorded
    name: str = getattr(getattr(model, "cfg", None), "name", "") or ""
    if name and _looks_random(model):
        return random_weights(name)
    return f"timm/{CHECKPOINTS[name]}" if name in CHECKPOINTS else name


def _looks_random(model: Any) -> bool:
    """Whether most of the frozen biases are zero, as Keras initializes them."""
    backend = backend_of(model)
    zero = [
        not backend.to_numpy(variable).any()
        for _, layer in backend.walk(model)
        for variable in backend.own_variables(layer)
        if backend.is_bias_like(variable)
        and not (isinstance(layer, (LoRALayer, FrozenLayer)) and layer._is_trained(variable))
    ]
    return 2 * sum(zero) > len(zero)


def _value(weight: ModelWeight, disabled_values: dict[str, Any]) -> Any:
    """Return the value of a weight, also of a disabled adapter; 16 bits as float32."""
    value = disabled_values.get(weight.key)
    value = weight.value() if value is None else value
    return value.astype("float32") if value.dtype.itemsize < 4 else value


def _is_trained(layer: Any, trainable: set[int]) -> bool:
    """Whether a layer trains variables. Its moving statistics then belong to the adapter."""
    return any(id(v) in trainable for v in backend_of(layer).own_variables(layer))


def _fully_trained_paths(names: ModuleNames) -> list[str]:
    """Return the paths of the layers that the config asks to train fully, shortest first."""
    config = config_of(names.model)
    if config is None:
        return []
    wanted = getattr(config, "lora_train_modules", ())
    paths = [path for path in names.layers if any(is_suffix(path, name) for name in wanted)]
    if getattr(config, "lora_train_classifier", None):
        paths += classifier_paths(names.model)
    return sorted(set(paths), key=len)


def _trained_variables(model: Any) -> list[Any]:
    """Return the variables that are trained, also if ``model.trainable`` is off now."""
    backend = backend_of(model)
    found = []
    for _, layer in backend.walk(model):
        own = backend.trainable_own_variables(layer)
        if hasattr(layer, "_is_trained"):
            own = [v for v in own if layer._is_trained(v)]
        found += own
    return found
