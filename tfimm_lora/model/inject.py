"""Inject LoRA into a live model and remove it again, in place."""

from __future__ import annotations

import warnings
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import adapt_layer, restore_layer
from tfimm_lora.layers.frozen import (
    FrozenLayer,
    freeze_layer,
    has_cheaper_call,
    is_in_inference_unasked,
    unfreeze_layer,
)
from tfimm_lora.layers.state import Converted, ConvertedState, drop_state, set_state, state_of
from tfimm_lora.model.changed_statistics import digests_of_statistics
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.model.registry import base_config, lora_base_of
from tfimm_lora.model.state import (
    drop_model_state,
    model_state,
    record_task,
    restore_replaced_weights,
)
from tfimm_lora.model.targeting import check_ready, config_for, select


def inject_lora(model: Any, **lora_arguments: Any) -> Any:
    """Inject LoRA into a built model, in place, without copying frozen weights.

    The target layers become LoRA layers: the same objects with another class and two small
    additional variables. All other layers are frozen, with batch normalization in inference
    mode. This works for functional, Sequential, subclassed and nested models of legacy Keras
    and Keras 3. If the model was trained, compile it again; recreate your own ``tf.function``
    objects that call it.

    Args:
        model: The model. It must be built.
        **lora_arguments: Fields of ``LoRAConfig``: lora_rank, lora_alpha, lora_targets,
            lora_qkv, lora_train_bias, ... ``lora_targets=None`` means the architecture's
            targets if the model's class is registered, otherwise "all": every supported
            layer except the classifier and position embeddings.

    Returns:
        The same model.

    Raises:
        TypeError: If an argument is unknown (the message suggests the most similar one), or
            if the model is not a Keras model.
        ValueError: If the model is not built or has LoRA already, if nothing matches the
            targets (the message lists candidates), or if a matched layer cannot be adapted.
            The model is not changed then.

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
    """Implement ``inject_lora`` for a complete config.

    Args:
        model: The model.
        config: The settings.
        rebuilt_by_class: Whether the class of the model injects LoRA itself when it is
            created from its config, so that whole-model files can be loaded again.
    """
    check_ready(model)
    chosen = select(model, config)
    if chosen.errors:
        raise chosen.errors[0]
    try:
        for path, settings in chosen.settings.items():
            adapt_layer(chosen.layers[path], settings)
        freeze_rest(model, config.lora_train_bias, chosen.trained, rebuilt_by_class)
        _require_agreement(model, chosen.trained)
    except BaseException:
        restore_layers(model)
        raise
    model_state(model).config = config
    model_state(model).statistics = digests_of_statistics(model, chosen.trained)
    drop_compiled(model, "LoRA was injected into")


def freeze_rest(
    model: Layer, train_bias: str, trained: set[int], rebuilt_by_class: bool
) -> None:
    """Freeze every layer that is neither adapted nor fully trained (``trained``, ids)."""
    backend = backend_of(model)
    in_inference = []
    for path, layer in backend.walk(model):
        if isinstance(layer, LoRALayer):
            continue
        if id(layer) in trained:
            _make_trainable(backend, layer, with_variables=True)
            continue
        refusal = None if rebuilt_by_class else _saving_refusal(backend, path, layer)
        is_root_that_filters = layer is model and rebuilt_by_class
        # A layer that is not built gets its variables when it is first called, in training.
        is_container = backend.is_model(layer) and backend.is_keras_class(type(layer))
        late = not layer.built and not is_container
        changes = backend.own_variables(layer) or refusal or has_cheaper_call(layer) or late
        if changes and not is_root_that_filters:
            freeze_layer(layer, train_bias == "all", refusal)
            in_inference += [path] if is_in_inference_unasked(layer) else []
        else:
            _make_trainable(backend, layer, with_variables=False)
    if in_inference:
        warnings.warn(
            f"The layers {', '.join(in_inference[:10])} have variables that are not trained, "
            "which are taken for statistics. While LoRA is in the model they run with "
            "training=False, so that these do not change. If a layer should behave as in "
            "training, name it in lora_train_modules.",
            stacklevel=4,
        )


def _require_agreement(model: Layer, trained: set[int]) -> None:
    """Raise if Keras would train a variable that should be frozen."""
    backend = backend_of(model)
    expected: set[int] = set()
    for _, layer in backend.walk(model):
        own = backend.trainable_own_variables(layer)
        if id(layer) not in trained:
            own = [v for v in own if isinstance(layer, Converted) and layer._is_trained(v)]
        expected |= {id(v) for v in own}
    others = [v for v in model.trainable_weights if id(v) not in expected]
    if others:
        raise ValueError(
            f"Model '{model.name}' trains variables that no layer of it holds, so that LoRA "
            f"cannot freeze them: {', '.join(backend.variable_name(v) for v in others[:10])}. "
            "Hold them in a Keras layer, with add_weight or as an attribute."
        )


def _make_trainable(backend: Backend, layer: Layer, with_variables: bool) -> None:
    """Make a layer that is not converted trainable, and record its original state."""
    original = backend.original(layer)
    flags = dict.fromkeys([id(v) for v in backend.trainable_own_variables(layer)], True)
    if not original.trainable or (with_variables and not all(original.flags.values())):
        set_state(layer, ConvertedState(original))
        backend.set_raw_trainable(layer, True)
        if with_variables:
            backend.restore_flags(layer, flags)


def _saving_refusal(backend: Backend, path: str, layer: Layer) -> str | None:
    """Return why a layer must not be saved in a whole-model file, or None.

    When Keras loads the file, a layer that creates other layers in its own code would be
    created without LoRA, and with everything in it trainable.
    """
    if backend.is_rebuilt_with_layers(layer):
        return None
    inside = [x for _, x in backend.walk(layer) if x is not layer and backend.own_variables(x)]
    if not inside and not (backend.is_model(layer) and backend.own_variables(layer)):
        return None
    where = f"Layer '{path}'" if path else f"Model '{layer.name}'"
    return (
        f"{where} ({type(layer).__name__}) creates its layers in its own code, so Keras "
        "would load this whole-model file without LoRA and with no layer frozen. Use "
        "model.save_weights; to load, build the model, call inject_lora with the same "
        "arguments, and then model.load_weights. Or save the merged ordinary model: "
        "convert_to_regular_model(model).save(...)."
    )


def remove_lora(model: Any, merge: bool = True) -> Any:
    """Remove LoRA from a model, in place; the reverse of ``inject_lora``.

    The result is the ordinary model: ordinary classes, its own variables, and the original
    trainability. It can be saved and loaded without this package. If the model was trained,
    compile it again.

    Args:
        model: A model with LoRA layers.
        merge: True (default) adds the updates to the kernels, and keeps the weights that an
            adapter replaced. False drops both, so that the model is restored exactly.

    Returns:
        The same model.

    Raises:
        ValueError: Within a disable_adapter block; if the model has neither LoRA layers nor
            layers frozen for LoRA (LoRA may have been removed from an inner model alone,
            which leaves frozen layers around it); or if a layer is not built.

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
        layer._require_enabled("removed")
    if not merge:
        for layer in layers.values():
            if layer.merged:  # which restores a merged bias, so it comes first
                layer.unmerge_weights()
        restore_replaced_weights(model)
        record_task(model, None)
    if merge:
        for layer in layers.values():
            layer._require_built("merge")
        for layer in layers.values():
            if not layer.merged:
                layer.merge_weights()
            layer._forget_merge()
    restore_layers(model)
    drop_compiled(model, "LoRA was removed from")
    return model


def _is_changed(model: Layer) -> bool:
    """Whether a model has layers that were converted or frozen for LoRA."""
    return any(state_of(layer) is not None for _, layer in backend_of(model).walk(model))


def restore_layers(model: Layer) -> None:
    """Restore the original class and trainability of every layer, and drop the updates."""
    backend = backend_of(model)
    for _, layer in backend.walk(model):
        if isinstance(layer, LoRALayer):
            restore_layer(layer)
        elif isinstance(layer, FrozenLayer):
            unfreeze_layer(layer)
        elif (state := state_of(layer)) is not None and state.original is not None:
            drop_state(layer)
            backend.restore(layer, state.original)
        drop_model_state(layer)
        base = lora_base_of(type(layer))
        if base is not None and base is not type(layer):
            cfg = base_config(layer.cfg, base)
            backend.swap_class(layer, base)
            layer.cfg = cfg


def drop_compiled(model: Layer, what: str) -> None:
    """Drop cached functions, and the compilation if its optimizer has other variables.

    An optimizer that has not made a step yet has none, and gets those that are trained then.

    Args:
        model: The model.
        what: The beginning of the warning, for example "LoRA was injected into".
    """
    backend = backend_of(model)
    backend.reset_functions(model)
    compiled = [
        x
        for _, x in backend.walk(model)
        if backend.is_model(x) and backend.is_compiled(x) and backend.has_built_optimizer(x)
    ]
    for inside in compiled:
        backend.mark_compiled(inside, False)  # its optimizer has other variables
    if compiled:
        warnings.warn(
            f"{what} model '{model.name}' after it was trained. Compile it again before "
            "training: its optimizer has other variables.",
            stacklevel=4,
        )
