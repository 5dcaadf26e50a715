"""Copy any Keras model, with ordinary classes, merged updates and new variables."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Variable
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.frozen import FrozenLayer, copying_plain_layers
from tfimm_lora.layers.state import original_class, state_of
from tfimm_lora.model.inject import restore_layers
from tfimm_lora.model.state import copy_description


def plain_copy(model: Layer) -> Any:
    """Create a model without LoRA that computes the same. The argument is not changed.

    Args:
        model: A built Keras model, with or without LoRA. The ``get_config`` of a subclassed
            model must return its arguments.

    Returns:
        A model of the same class, with LoRA updates merged into its kernels, and trainable
        as the argument was before LoRA.

    Raises:
        ValueError: If the model cannot be created again from its config.
    """
    backend = backend_of(model)
    with backend.created_like(model):
        copy = _recreate(backend, model)
    restore_layers(copy)
    _copy_state(backend, model, copy)
    copy_description(model, copy)
    return copy


def _recreate(backend: Backend, model: Layer) -> Any:
    """Create a model from the config of another, without the values of its variables."""
    classes = {type(layer).__name__: type(layer) for _, layer in backend.walk(model)}
    cls = _plain_class_of(model)
    try:
        # Keras 3 would compile the copy again, which fails for losses that are functions.
        with (
            copying_plain_layers(),
            backend.uncompiled(model),
            backend.keras.utils.custom_object_scope(classes),
        ):
            if backend.is_rebuilt_with_layers(model):
                return backend.keras.models.clone_model(model)
            copy = cls.from_config(model.get_config())  # type: ignore[attr-defined]
    except Exception as error:
        raise ValueError(
            _cannot_copy(model, f"creating it from its config failed: {error}")
        ) from error
    build_like(backend, copy, model)
    return copy


def build_like(backend: Backend, model: Layer, other: Layer) -> None:
    """Create all variables of a model, for the input shapes of another."""
    # What is not built in a functional model is not in its graph: no call would build it.
    if backend.is_functional(model) or all(layer.built for _, layer in backend.walk(model)):
        return
    if hasattr(model, "dummy_inputs"):
        model(model.dummy_inputs)
        return
    shapes = backend.input_shapes(other)
    if shapes is None:
        raise ValueError(_cannot_copy(other, "the shape of its inputs is unknown"))
    model(backend.map_shapes(lambda s: np.zeros([size or 1 for size in s], "float32"), shapes))


def _plain_class_of(model: Layer) -> type:
    return original_class(type(model)) if isinstance(model, FrozenLayer) else type(model)


def _copy_state(backend: Backend, model: Layer, copy: Layer) -> None:
    """Copy values and trainability of a model into its copy, layer by layer."""
    layers = [_plain_layers(backend, m) for m in (model, copy)]
    if len(layers[0]) != len(layers[1]):
        # A layer without weights, which two layers share, may have become two.
        layers = [[x for x in each if x.weights] for each in layers]
    pairs = list(zip(*layers))
    shapes = [[_shapes(backend, layer) for layer in pair] for pair in pairs]
    if len(layers[0]) != len(layers[1]) or any(one != other for one, other in shapes):
        raise ValueError(
            _cannot_copy(model, "a model created from its config has other variables")
        )
    for original, copied in pairs:
        variables = _plain_variables(backend, original)
        for variable, target in zip(variables, backend.own_variables(copied)):
            if isinstance(original, LoRALayer):
                target.assign(original.value_of(variable, merged=True))
            else:
                target.assign(backend.to_numpy(variable))
        _copy_trainability(backend, original, copied, variables)


def _copy_trainability(
    backend: Backend, layer: Layer, copied: Layer, variables: list[Variable]
) -> None:
    """Set the trainability of a copied layer to that of its original before LoRA."""
    state, record = state_of(layer), backend.original(layer)
    if state is not None:
        created = record._replace(flags=backend.created_flags(layer))
        record = state.original or created
    backend.set_raw_trainable(copied, record.trainable)
    targets = backend.own_variables(copied)
    flags = {id(t): record.flags.get(id(v), True) for v, t in zip(variables, targets)}
    backend.restore_flags(copied, flags if record.flags else {})


def _plain_layers(backend: Backend, model: Layer) -> list[Layer]:
    """Return all layers of a model except input layers and the dropout layers that LoRA added.

    Models of keras_hub share their input layer with the backbone inside; copies do not.
    """
    inputs = backend.keras.layers.InputLayer
    layers = [x for _, x in backend.walk(model) if not isinstance(x, inputs)]
    return [x for x in layers if x.name != "lora_dropout"]


def _plain_variables(backend: Backend, layer: Layer) -> list[Variable]:
    variables = backend.own_variables(layer)
    if isinstance(layer, LoRALayer):
        factors = {id(v) for v in layer._lora_variables().values()}
        variables = [v for v in variables if id(v) not in factors]
    return variables


def _shapes(backend: Backend, layer: Layer) -> list[tuple[int, ...]]:
    return [tuple(v.shape) for v in _plain_variables(backend, layer)]


def _cannot_copy(model: Layer, why: str) -> str:
    return (
        f"Model '{model.name}' ({type(model).__name__}) cannot be copied: {why}. Implement "
        "a get_config that returns all its arguments, or convert it in place with inject_lora "
        "and remove_lora."
    )
