"""``load_adapter``: from an adapter into a live model, in place."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections import Counter
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.base_architecture import differences
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.module_names import ModuleNames, Weight
from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.adapters.save import adapter_of, trained_whole
from tfimm_lora.adapters.torch_layout import (
    DoesNotFit,
    kernel_shape,
    kinds_agree,
    moves_only_its_parts,
    positions,
    sure_kind,
    values_for,
)
from tfimm_lora.backend import backend_of
from tfimm_lora.config import LoRAConfig, lora_field_names
from tfimm_lora.layer_paths import nearest
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import supported
from tfimm_lora.layers.qkv import layout_of
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.inject import adapt_model, inject_lora, remove_lora
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.registry import lora_base_of
from tfimm_lora.model.replaced_weights import Replaced, forget, remember, replaced
from tfimm_lora.model.targeting import require_built

#: For LoRA layers the values of their variables by name.
Values = list[tuple[LoRALayer, dict[str, np.ndarray]]]


def load_adapter(
    model: Any, adapter: Adapter | str | os.PathLike[str], **hub_options: Any
) -> Any:
    """Put an adapter into a model, in place.

    Into a model with LoRA in the same layers at the same ranks it only assigns values:
    compiled functions keep working, without a new trace, with the new weights. A merged
    model stays merged. A model without LoRA, or with another one, gets the LoRA that the
    adapter asks for (what was learned there is dropped) and must be compiled again.

    Weights that the adapter holds whole (a classifier, biases) replace the model's, which come
    back when an adapter is loaded that does not hold them. They are trained on only where LoRA
    is put in anew, or where the model trains them already.

    Args:
        model: A built Keras model, with LoRA or without.
        adapter: An ``Adapter``, a folder, or "hf://user/repo".
        **hub_options: As in ``Adapter.load``.

    Returns:
        The same model.

    Raises:
        FileNotFoundError, ImportError: as ``Adapter.load``.
        ValueError: if a file is damaged or not supported; or if the adapter does not fit,
            with all layers and weights that the model has not, or has in another shape. The
            model is then as it was.

    Warns:
        UserWarning: where the model was trained whole in weights that the adapter does not
            hold: they stay as they are.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> def make():
        ...     return tf.keras.Sequential([
        ...         tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> tuned = lora.inject_lora(make(), lora_rank=2, lora_targets=["fc"])
        >>> model = lora.load_adapter(make(), lora.adapter_of(tuned))
        >>> type(model.layers[-1]).__name__
        'LoRADense'
    """
    if not isinstance(adapter, Adapter):
        adapter = Adapter.load(adapter, **hub_options)
    require_built(model)
    names = ModuleNames(model)
    weights = _fitting_weights(model, names, adapter)
    left: list[Weight] = []
    if not names.adapted():
        values = _injected(model, adapter)
    else:
        _require_enabled(model, names)
        left = _leftovers(model, names, adapter)
        try:
            values = _values(model, names, adapter)
        except DoesNotFit:
            values = _injected_anew(model, adapter)
    for layer, given in values:
        layer.assign_update(given)
    _replace_weights(model, weights, left)
    return model


def lora_arguments(model: Any, adapter: Adapter) -> dict[str, Any]:
    """The fields of ``LoRAConfig`` that give a model the LoRA an adapter asks for.

    Raises:
        ValueError: if the model has not all of the adapter's layers and weights in their
            shapes; all that differs is named.
    """
    names = ModuleNames(model)
    _fitting_weights(model, names, adapter)
    paths = {names.paths[module]: x for module, x in adapter.layers.items()}
    parts = _parts(paths)
    ranks = {path: _rank(names.layers[path], x, parts) for path, x in paths.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(x.scale for x in paths.values()).most_common(1)[0][0]
    dotted = {path: path.replace("/", ".") for path in paths}
    alphas = {dotted[p]: x.scale * ranks[p] for p, x in paths.items()}
    # Without an alpha the scale is 1 at any rank.
    plain = all(x.scale == 1 for x in paths.values())
    heads = classifier_paths(model)
    modules = [p for module in adapter.modules for p in module_paths(names, module)]
    all_heads = bool(heads) and set(heads) <= set(modules)
    return {
        "lora_rank": rank,
        "lora_alpha": None if plain else scale * rank,
        "lora_use_rslora": False,
        "lora_use_dora": adapter.use_dora,
        "lora_bias": adapter.branch_bias,
        "lora_rank_pattern": exact_pattern({dotted[p]: ranks[p] for p in paths}, rank),
        "lora_alpha_pattern": {} if plain else exact_pattern(alphas, scale * rank),
        "lora_targets": exact_targets(list(paths), list(names.layers)),
        "lora_exclude": None,  # the targets are exact
        "lora_layers": None,
        "lora_layers_pattern": None,
        "lora_qkv": parts,
        "lora_dropout": adapter.dropout,
        "lora_train_bias": adapter.bias,
        "lora_train_modules": [p for p in modules if not (all_heads and p in heads)],
        "lora_train_classifier": all_heads,
    }


def _rank(layer: Any, update: LayerUpdate, parts: str | None) -> int:
    """``lora_rank`` for an update, which may be written out at a wider rank in its file."""
    if update.kind == "batched":
        return update.rank // positions(layer)
    return update.rank // (len(update.qkv[0]) if parts and update.qkv else 1)


def module_paths(names: ModuleNames, module: str) -> list[str]:
    """The layer of a module trained whole; of a mere list of torch's, the layers in it."""
    if module in names.paths:
        return [names.paths[module]]
    inside = [
        weight.path
        for weight in names.weights
        if any(key.startswith(f"{module}.") for key in (weight.key, *weight.old_keys))
    ]
    return list(dict.fromkeys(inside))


def _parts(paths: dict[str, LayerUpdate]) -> str | None:
    """``lora_qkv`` of an adapter whose fused projections were adapted by parts, if so.

    What does not follow one rule is loaded at the wider rank, which is as exact.
    """
    layouts = {path: layout_of(path) or "" for path in paths}
    hints = {path: x.qkv for path, x in paths.items() if x.qkv}
    if not hints or not all(moves_only_its_parts(paths[path]) for path in hints):
        return None
    alone = [layout for layout in layouts.values() if len(layout) == 1]
    letters = "".join([*alone, *(qkv[0] for qkv in hints.values())])
    chosen = "".join(part for part in "qkv" if part in letters)
    for path, layout in layouts.items():
        expected = "".join(part for part in layout if part in chosen)
        if hints.get(path) != ((expected, layout) if len(layout) > 1 else None):
            return None
    return chosen


def exact_targets(paths: list[str], everything: list[str]) -> list[str] | str:
    """``lora_targets`` for these layers and no others."""
    chosen = set(paths)
    ends_others = any(
        other.endswith("/" + path)
        for path in chosen
        for other in everything
        if other not in chosen
    )
    if not ends_others and not any("#" in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def check_fits(model: Any, adapter: Adapter) -> None:
    """Raise a ValueError that names what of an adapter a model has not, or otherwise."""
    _fitting_weights(model, ModuleNames(model), adapter)


# -- does it fit? ---------------------------------------------------------------------------


def _fitting_weights(
    model: Any, names: ModuleNames, adapter: Adapter
) -> list[tuple[Weight, np.ndarray]]:
    """The weights that the adapter replaces, once everything in it was found to fit."""
    problems = differences(model, adapter)
    modules = {module for module, path in names.paths.items() if _can_adapt(names, path)}
    for module, update in adapter.layers.items():
        if module not in modules:
            near = ", ".join(nearest([module.replace(".", "/")], sorted(modules), 3))
            problems.append(f"no layer {module}" + (f" (nearest: {near})" if near else ""))
            continue
        layer = names.layers[names.paths[module]]
        shape, kind = kernel_shape(layer), sure_kind(layer)
        if _squeezed(shape) != _squeezed(update.shape):
            problems.append(f"{module} is of shape {shape}, the update {update.shape}")
        elif kind is not None and not kinds_agree(kind, update.kind):
            problems.append(f"{module} is of the kind {kind!r}, the update {update.kind!r}")
    # Names of today last: an older one of another layer may be the same.
    known = {key: weight for weight in names.weights for key in weight.old_keys}
    known.update({weight.key: weight for weight in names.weights})
    counts = Counter(weight.key for weight in names.weights)
    weights = []
    classifier = False
    for key, value in adapter.weights.items():
        weight = known.get(key)
        if counts[key] > 1:
            problems.append(f"{counts[key]} weights called {key}")
            continue
        if weight is None:
            problems.append(f"no weight {key}")
        elif not weight.fits(value):
            problems.append(f"{key} has {weight.value().shape}, the adapter {value.shape}")
            classifier |= weight.path in classifier_paths(model)
        else:
            weights.append((weight, value))
    if problems:
        raise ValueError(_message(model, adapter, problems, classifier))
    return weights


def _can_adapt(names: ModuleNames, path: str) -> bool:
    layer = names.layers[path]
    return isinstance(layer, LoRALayer) or supported(layer)


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [*shape[:2], *(size for size in shape[2:] if size != 1)]


def _message(
    model: Any, adapter: Adapter, problems: list[str], classifier: bool = False
) -> str:
    listed = "; ".join(problems[:20])
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    of = f" of {adapter.base_model!r}" if adapter.base_model else ""
    remedy = "Load it into the model that it was trained on"
    if classifier:
        remedy += ", with as many classes: create_model(..., nb_classes=...)"
    return (
        f"Received an adapter{of} that does not fit model '{model.name}' "
        f"({type(model).__name__}): {listed}{more}. {remedy}. The model is as it was."
    )


def _values(model: Any, names: ModuleNames, adapter: Adapter) -> Values:
    """The values of every LoRA layer of the model, if it has just the adapter's layers."""
    layers = names.adapted()
    given = {names.paths[module]: x for module, x in adapter.layers.items()}
    differing = sorted(set(layers) ^ set(given))
    if differing:
        raise DoesNotFit(f"has LoRA in other layers: {', '.join(differing)}")
    values = []
    for path, layer in layers.items():
        try:
            values.append((layer, values_for(layer, given[path])))
        except DoesNotFit as error:
            raise DoesNotFit(f"{names.modules[path]} {error}") from error
    return values


# -- putting it in --------------------------------------------------------------------------


def _injected(model: Any, adapter: Adapter) -> Values:
    """LoRA put into a model without it, and the values for its layers."""
    inject_lora(model, **lora_arguments(model, adapter))
    try:
        return _values(model, ModuleNames(model), adapter)
    except DoesNotFit as error:
        remove_lora(model, merge=False)
        raise ValueError(_message(model, adapter, [str(error)])) from error


def _injected_anew(model: Any, adapter: Adapter) -> Values:
    """Another LoRA put into a model in place of the one it has; that one back on failure."""
    own_class = type(model) if lora_base_of(type(model)) not in (None, type(model)) else None
    before, cfg = adapter_of(model), getattr(model, "cfg", None)
    if own_class is not None and not isinstance(cfg, LoRAConfig):
        raise ValueError(
            f"Received an adapter with other layers or ranks than model '{model.name}' "
            f"({type(model).__name__}) has, whose own code decides on its LoRA. Create the "
            f"model as the adapter needs it: {lora_arguments(model, adapter)}."
        )

    def inject(arguments: dict[str, Any]) -> None:
        if own_class is None:
            inject_lora(model, **arguments)
            return
        backend_of(model).swap_class(model, own_class)
        changed: Any = cfg
        model.cfg = dataclasses.replace(changed, **arguments)
        adapt_model(model, model.cfg, rebuilt_by_class=True)

    config = model.__dict__.get("_lora_config")
    was = {name: getattr(config, name) for name in lora_field_names()} if config else None
    arguments, now = lora_arguments(model, adapter), was or lora_arguments(model, before)
    known = replaced(model)
    forget(model)  # they are given back, or not, by what comes
    remove_lora(model, merge=False)
    try:
        inject(arguments)
        values = _values(model, ModuleNames(model), adapter)
    except ValueError as error:
        if has_lora(model):
            remove_lora(model, merge=False)
        inject(now)
        for layer, given in _values(model, ModuleNames(model), before):
            layer.assign_update(given)
        remember(model, known)
        raise ValueError(_message(model, adapter, [str(error)])) from error
    remember(model, known)
    return values


def _replace_weights(
    model: Any, weights: list[tuple[Weight, np.ndarray]], left: list[Weight]
) -> None:
    """Give weights the adapter's values, and those of the last adapter their own back."""
    base, backend = replaced(model), backend_of(model)
    kept = {
        weight.key: base.get(weight.key)
        or Replaced(weight.variable, backend.to_numpy(weight.variable))
        for weight in (*(w for w, _ in weights), *left)
    }
    for key, former in base.items():
        if key not in kept:
            former.variable.assign(former.before)
    for weight, value in weights:
        weight.assign(value)
    remember(model, kept)


def _require_enabled(model: Any, names: ModuleNames) -> None:
    if any(layer._lora_state.disabled for layer in names.adapted().values()):
        raise ValueError(
            f"The adapter of model '{model.name}' is disabled. Leave the disable_adapter "
            "block before you load another one."
        )


def _leftovers(model: Any, names: ModuleNames, adapter: Adapter) -> list[Weight]:
    """Weights that were trained whole here and have no value to go back to."""
    known = {*adapter.weights, *replaced(model)}
    left = [w for w in trained_whole(model, names)[1] if w.key not in known]
    if left:
        listed = [weight.key for weight in left]
        warnings.warn(
            f"Model '{model.name}' trains {', '.join(listed[:5])}"
            f"{', ...' if len(left) > 5 else ''} whole, which the adapter does not hold: they "
            "stay as they are.",
            stacklevel=3,
        )
    return left
