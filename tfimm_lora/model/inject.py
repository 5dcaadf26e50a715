"""Putting LoRA into a live model and taking it out again, in place."""

from __future__ import annotations

import warnings
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import adapt_layer, restore_layer
from tfimm_lora.layers.frozen import FrozenLayer, freeze_layer, has_cheaper_call, unfreeze_layer
from tfimm_lora.layers.state import ConvertedState, drop_state, set_state, state_of
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.model.registry import base_config, lora_base_of
from tfimm_lora.model.state import drop_model_state, model_state, restore_replaced_weights
from tfimm_lora.model.targeting import check_ready, config_for, select


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
    config = config_for(model, lora_arguments, "inject_lora")
    adapt_model(model, config, rebuilt_by_class=False)
    return model


def adapt_model(model: Any, config: LoRAConfig, rebuilt_by_class: bool) -> None:
    """``inject_lora`` with a finished config.

    ``rebuilt_by_class`` says that the class of the model puts LoRA in by itself when it
    is created from its config, so that whole-model files can be loaded again.
    """
    check_ready(model)
    chosen = select(model, config)
    if chosen.errors:
        raise chosen.errors[0]
    try:
        for path, settings in chosen.settings.items():
            adapt_layer(chosen.layers[path], settings)
        freeze_rest(model, config.lora_train_bias, chosen.trained, rebuilt_by_class)
    except BaseException:
        _take_out(model)
        raise
    model_state(model).config = config
    forget_traces(model, "LoRA was put into")


def freeze_rest(model: Any, train_bias: str, trained: set[int], rebuilt_by_class: bool) -> None:
    """Freeze every layer that is neither adapted nor, by id, in ``trained``."""
    backend = backend_of(model)
    for path, layer in backend.walk(model):
        if isinstance(layer, LoRALayer):
            continue
        if id(layer) in trained:
            _open(backend, layer, with_variables=True)
            continue
        refusal = None if rebuilt_by_class else _saving_refusal(backend, path, layer)
        is_root_that_filters = layer is model and rebuilt_by_class
        changes = backend.own_variables(layer) or refusal or has_cheaper_call(layer)
        if changes and not is_root_that_filters:
            freeze_layer(layer, train_bias == "all", refusal)
        else:
            _open(backend, layer, with_variables=False)


def _open(backend: Any, layer: Any, with_variables: bool) -> None:
    """Let a layer that stays as it is be trained, remembering how it was found."""
    original = backend.original(layer)
    flags = dict.fromkeys([id(v) for v in backend.trainable_own_variables(layer)], True)
    if not original.trainable or (with_variables and not all(original.flags.values())):
        set_state(layer, ConvertedState(original))
        backend.set_raw_trainable(layer, True)
        if with_variables:
            backend.restore_flags(layer, flags)


def _saving_refusal(backend: Any, path: str, layer: Any) -> str | None:
    """Why a layer must not be saved in a whole-model file, or None if it may be.

    A layer that creates other layers in its own code would be created without LoRA, and
    with everything in it trainable, when Keras loads the file.
    """
    if backend.is_rebuilt_with_layers(layer):
        return None
    inside = [x for _, x in backend.walk(layer) if x is not layer and backend.own_variables(x)]
    if not inside and not (backend.is_model(layer) and backend.own_variables(layer)):
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
        restore_replaced_weights(model)
    if merge:
        for layer in layers.values():
            layer._require_built("merge")
        for layer in layers.values():
            if not layer.merged:
                layer.merge_weights()
            layer._forget_merge()
    _take_out(model)
    forget_traces(model, "LoRA was taken out of")
    return model


def _is_changed(model: Any) -> bool:
    """Whether a model has layers that were frozen for LoRA, if no LoRA itself."""
    return any(state_of(layer) is not None for _, layer in backend_of(model).walk(model))


def _take_out(model: Any) -> None:
    """Give every layer its own class and trainability back, dropping the updates."""
    backend = backend_of(model)
    for _, layer in backend.walk(model):
        if isinstance(layer, LoRALayer):
            restore_layer(layer)
        elif isinstance(layer, FrozenLayer):
            unfreeze_layer(layer)
        elif (state := state_of(layer)) is not None and state.original is not None:
            drop_state(layer)
            backend.restore(layer, state.original)
        if drop_model_state(layer):
            layer.__dict__.pop("call", None)  # of attached adapters
        base = lora_base_of(type(layer))
        if base is not None and base is not type(layer):
            cfg = base_config(layer.cfg, base)
            backend.swap_class(layer, base)
            layer.cfg = cfg


def forget_traces(model: Any, what: str) -> None:
    """Drop cached functions, and the compilation, which knows other variables."""
    backend = backend_of(model)
    backend.reset_functions(model)
    compiled = [
        x for _, x in backend.walk(model) if backend.is_model(x) and backend.is_compiled(x)
    ]
    for inside in compiled:
        backend.mark_uncompiled(inside)
    if compiled:
        warnings.warn(
            f"{what} model '{model.name}' after it was compiled. Compile it again before "
            "training: its optimizer knows other variables.",
            stacklevel=4,
        )
