"""Putting LoRA into a live model and taking it out again, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from tfimm_lora import _keras
from tfimm_lora.classifier import classifier_paths
from tfimm_lora.config import (
    LoRAConfig,
    Presets,
    Targets,
    check_keywords,
    lora_field_names,
)
from tfimm_lora.layers import parts
from tfimm_lora.layers.base import LoRALayer, LoRASpec, make_spec
from tfimm_lora.layers.frozen import FrozenLayer, freeze_layer, thaw_layer
from tfimm_lora.layers.lookup import adapt_layer, lora_class, restore_layer, supported
from tfimm_lora.layers.routes import detach
from tfimm_lora.merge import has_lora, lora_layers
from tfimm_lora.registry import base_config, default_targets, lora_base_of, presets
from tfimm_lora.replaced import forget, give_back
from tfimm_lora.targets import (
    check_expression,
    matches,
    nearest,
    no_match_error,
    resolve,
    unmatched,
    value_for,
)
from tfimm_lora.trainability import inside_paths, layers_under


def inject_lora(model: Any, **lora_arguments: Any) -> Any:
    """Put LoRA into a built model, in place, without copying a frozen weight.

    The targeted layers become LoRA layers: the same objects with another class and two
    small variables more. Every other layer is frozen, batch normalisation in inference
    mode. Works for functional, Sequential, subclassed and nested models of both Kerases.
    A compiled model must be compiled again; a ``tf.function`` of your own that calls the
    model must be made again.

    Args:
        model: The model. It must be built.
        **lora_arguments: Fields of ``LoRAConfig``: lora_rank, lora_alpha, lora_targets,
            lora_qkv, lora_train_bias, ... ``lora_targets=None`` takes the architecture's
            targets where the model's class is registered, else every supported layer but
            the classifier.

    Returns:
        The same model.

    Raises:
        TypeError: for an unknown argument (the nearest is named) or no Keras model.
        ValueError: if the model is not built or has LoRA already, if nothing matches the
            targets (candidates are listed), or if a matched layer cannot be adapted. The
            model is then left as it was.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc1"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> lora.inject_lora(model, lora_rank=2) is model
        True
        >>> [type(layer).__name__ for layer in model.layers]
        ['LoRADense', 'FrozenDense']

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.
    """
    check_keywords(lora_arguments, lora_field_names(), "inject_lora")
    config = LoRAConfig(**lora_arguments)
    if config.lora_targets is None:
        config.lora_targets = default_targets(type(model))
    adapt_model(model, config, rebuilt_by_class=False)
    return model


def adapt_model(model: Any, config: LoRAConfig, rebuilt_by_class: bool) -> None:
    """``inject_lora`` with a finished config.

    ``rebuilt_by_class`` says that the class of the model puts LoRA in by itself when it
    is created from its config, so that whole-model files can be loaded again.
    """
    seam = _keras.of(model)
    _check_model(seam, model)
    layers = list(seam.walk(model))
    classifier = classifier_paths(model)
    targets = _find_targets(layers, config.lora_targets, classifier, presets(type(model)))
    if config.lora_train_classifier and not classifier:
        raise ValueError(
            f"Received lora_train_classifier=True for model '{model.name}', in which no "
            "classifier was found: no dense layer gives its output. Leave it out, and name "
            "what you want to train whole in lora_train_modules."
        )
    trained = inside_paths(layers, classifier if config.lora_train_classifier else ())
    trained |= layers_under(layers, config.lora_train_modules)
    targets = {path: layer for path, layer in targets.items() if id(layer) not in trained}
    if not targets:
        raise ValueError(
            f"Received lora_targets={config.lora_targets!r} and lora_train_modules="
            f"{config.lora_train_modules!r} for model '{model.name}', which leave no layer to "
            "adapt: layers that are trained whole get no LoRA."
        )
    specs = _specs(seam, config, targets)
    _check_targets(targets, specs)
    try:
        for path, spec in specs.items():
            adapt_layer(targets[path], spec)
        freeze_rest(model, config.lora_train_bias, trained, rebuilt_by_class)
    except BaseException:
        _take_out(model)
        raise
    model.__dict__["_lora_config"] = config
    _forget_traces(model, "LoRA was put into")


def _check_model(seam: Any, model: Any) -> None:
    """Raise unless a model is built and without LoRA."""
    require_built(model)
    if has_lora(model):
        raise ValueError(
            f"Received model '{model.name}', which has LoRA layers already. Take them out "
            "with remove_lora (merge=True keeps what they learned), then put new ones in."
        )
    if any(isinstance(x, FrozenLayer) for _, x in seam.walk(model)):
        raise ValueError(
            f"Received model '{model.name}', which is part of a model that LoRA was put "
            "into: its layers are frozen. Put LoRA into the whole model, with lora_targets."
        )


def require_built(model: Any) -> None:
    """Raise unless a model is built."""
    seam = _keras.of(model)
    if not model.built or not any(seam.own_variables(x) for _, x in seam.walk(model)):
        raise ValueError(
            f"Received model '{model.name}', which is not built: its layers have no "
            "variables yet. Call it on an input (or model.build(input_shape)) first."
        )


def _find_targets(
    layers: Iterable[tuple[str, Any]],
    targets: Targets,
    classifier: list[str],
    table: Presets,
) -> dict[str, Any]:
    """The layers to adapt by path. A name that means none of them is an error."""
    meant, is_preset = resolve(targets, table)
    check_expression(meant)
    candidates = {path: layer for path, layer in layers if supported(layer)}
    if meant is None:
        found = {p: x for p, x in candidates.items() if p not in classifier}
    else:
        found = {p: x for p, x in candidates.items() if matches(p, meant)}
    missing = [] if is_preset else unmatched(meant, list(candidates))
    if missing or not found:
        raise no_match_error(missing or targets, candidates, table)
    return found


def _specs(seam: Any, config: LoRAConfig, targets: dict[str, Any]) -> dict[str, LoRASpec]:
    """The settings of each layer to adapt; those without a part in ``lora_qkv`` are left
    out."""

    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        for key in getattr(config, name):
            if not any(value_for(path, {key: True}, False) for path in targets):
                raise ValueError(
                    f"Received {name} with the key {key!r}, which matches none of the layers "
                    f"to adapt: {', '.join(nearest([key], list(targets), 10))}."
                )

    def spec_of(path: str, **more: Any) -> LoRASpec:
        arguments = config.layer_arguments()
        arguments["lora_train_bias"] = config.lora_train_bias != "none"
        rank = value_for(path, config.lora_rank_pattern, config.lora_rank)
        alpha = value_for(path, config.lora_alpha_pattern, config.lora_alpha)
        return make_spec(seam, {**arguments, "lora_rank": rank, "lora_alpha": alpha, **more})

    if config.lora_qkv is None:
        return {path: spec_of(path) for path in targets}
    layouts = {path: parts.layout_of(path) for path in targets}
    if not any(layouts.values()):
        raise ValueError(
            f"Received lora_qkv={config.lora_qkv!r}, but none of the layers to adapt is "
            f"called like a projection of attention ({', '.join(parts.LAYOUTS)}). Leave it "
            f"out, or target such layers. To be adapted: {', '.join(list(targets)[:10])}."
        )
    specs = {}
    for path, layout in layouts.items():
        chosen = "".join(part for part in layout or "" if part in config.lora_qkv)
        if layout is None or (len(layout) == 1 and chosen):
            specs[path] = spec_of(path)
        elif chosen:
            specs[path] = spec_of(path, lora_qkv=chosen, lora_qkv_layout=layout)
    if not specs:
        raise ValueError(
            f"Received lora_qkv={config.lora_qkv!r}, of which the layers to adapt have no "
            f"part: {', '.join(targets)}."
        )
    return specs


def _check_targets(targets: dict[str, Any], specs: dict[str, LoRASpec]) -> None:
    """Raise one error for all layers that cannot be adapted."""
    problems = []
    for path, spec in specs.items():
        layer = targets[path]
        if not layer.built:
            problems.append(
                f"layer '{path}' is not built, the model has never used it; call the model "
                "on an input that does, or leave the layer out of lora_targets"
            )
            continue
        try:
            lora_class(type(layer)).check_support(layer, spec)  # type: ignore[attr-defined]
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def freeze_rest(model: Any, train_bias: str, trained: set[int], rebuilt_by_class: bool) -> None:
    """Freeze every layer that is neither adapted nor, by id, in ``trained``."""
    seam = _keras.of(model)
    for path, layer in seam.walk(model):
        if isinstance(layer, LoRALayer):
            continue
        if id(layer) in trained:
            _open(seam, layer, with_variables=True)
            continue
        refusal = None if rebuilt_by_class else _saving_refusal(seam, path, layer)
        is_root_that_filters = layer is model and rebuilt_by_class
        if (seam.own_variables(layer) or refusal) and not is_root_that_filters:
            freeze_layer(layer, train_bias == "all", refusal)
        else:
            _open(seam, layer, with_variables=False)


def _open(seam: Any, layer: Any, with_variables: bool) -> None:
    """Let a layer that stays as it is be trained, remembering how it was found."""
    found = seam.found(layer)
    flags = dict.fromkeys([id(v) for v in seam.trainable_own_variables(layer)], True)
    if not found.trainable or (with_variables and not all(found.flags.values())):
        layer.__dict__["_lora_found"] = found
        seam.set_raw_trainable(layer, True)
        if with_variables:
            seam.restore_flags(layer, flags)


def _saving_refusal(seam: Any, path: str, layer: Any) -> str | None:
    """Why a layer must not be saved in a whole-model file, or None if it may be.

    A layer that creates other layers in its own code would be created without LoRA, and
    with everything in it trainable, when Keras loads the file.
    """
    if seam.is_rebuilt_with_layers(layer):
        return None
    inside = [x for _, x in seam.walk(layer) if x is not layer and seam.own_variables(x)]
    if not inside and not (seam.is_model(layer) and seam.own_variables(layer)):
        return None
    where = f"Layer '{path}'" if path else f"Model '{layer.name}'"
    return (
        f"{where} ({type(layer).__name__}) creates its layers in its own code, so Keras "
        "would load this whole-model file without their LoRA and without their freezing. "
        "Use model.save_weights and, to load, build the model, call inject_lora with the "
        "same arguments and model.load_weights. Or save the merged ordinary model: "
        "convert_to_regular_model(model).save(...)."
    )


def remove_lora(model: Any, merge: bool = True) -> Any:
    """Take LoRA out of a model, in place; the reverse of ``inject_lora``.

    What is left is the ordinary model: ordinary classes, its own variables, trainability
    as it was found. It saves and loads without this package. A compiled model must be
    compiled again.

    Args:
        model: A model with LoRA layers.
        merge: True (default) adds the updates to the kernels, and keeps the weights that an
            adapter replaced; False drops both, so that the model is what it was, bit for
            bit.

    Returns:
        The same model.

    Raises:
        ValueError: within a disable_adapter block; if the model has neither LoRA layers nor
            layers frozen for LoRA (as a model has whose adapted part was taken out by
            itself); or if one is not built.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_targets=["fc"])
        >>> [type(layer).__name__ for layer in lora.remove_lora(model).layers]
        ['Dense']
    """
    layers = lora_layers(model) if has_lora(model) or not _is_changed(model) else {}
    for layer in layers.values():
        layer._require_enabled("taken out")
    if not merge:
        give_back(model)
    if merge:
        for layer in layers.values():
            layer._require_built("merge")
        for layer in layers.values():
            if not layer.merged:
                layer.merge_weights()
            layer._forget_merge()
    _take_out(model)
    _forget_traces(model, "LoRA was taken out of")
    return model


def _is_changed(model: Any) -> bool:
    """Whether a model has layers that were frozen for LoRA, if no LoRA itself."""
    return any(
        isinstance(layer, FrozenLayer) or "_lora_found" in layer.__dict__
        for _, layer in _keras.of(model).walk(model)
    )


def _take_out(model: Any) -> None:
    """Give every layer its own class and trainability back, dropping the updates."""
    seam = _keras.of(model)
    for _, layer in seam.walk(model):
        if isinstance(layer, LoRALayer):
            restore_layer(layer)
        elif isinstance(layer, FrozenLayer):
            thaw_layer(layer)
        elif "_lora_found" in layer.__dict__:
            seam.restore(layer, layer.__dict__.pop("_lora_found"))
        layer.__dict__.pop("_lora_config", None)
        forget(layer)
        detach(layer)
        base = lora_base_of(type(layer))
        if base is not None and base is not type(layer):
            cfg = base_config(layer.cfg, base)
            seam.swap_class(layer, base)
            layer.cfg = cfg


def _forget_traces(model: Any, what: str) -> None:
    """Drop cached functions, and the compilation, which knows other variables."""
    seam = _keras.of(model)
    seam.reset_functions(model)
    compiled = [x for _, x in seam.walk(model) if seam.is_model(x) and seam.is_compiled(x)]
    for inside in compiled:
        seam.mark_uncompiled(inside)
    if compiled:
        warnings.warn(
            f"{what} model '{model.name}' after it was compiled. Compile it again before "
            "training: its optimizer knows other variables.",
            stacklevel=4,
        )
