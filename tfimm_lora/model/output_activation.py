"""The activation at the end of a model: what it is, and a model without or with another one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor

#: The activations whose outputs are probabilities.
PROBABILITIES = ("softmax", "sigmoid")

#: The sums of the outputs of a softmax in 16 bits differ from 1 by up to 1e-2.
_SUM_TOLERANCE = 1e-2

#: The classes of layers, and of operations of Keras 3, that keep the values of their input.
_SHAPES = ("Reshape", "Flatten", "Squeeze", "Identity", "Dropout", "Cast")


class _End(NamedTuple):
    """The layer that applies the last activation of a model.

    Attributes:
        name: The name of the activation; "linear" if there is none.
        layer: The layer that applies it.
        model: The innermost functional or Sequential model that contains the layer.
        inputs: The symbolic inputs of the layer; empty in a Sequential without a graph.
        is_last: Whether no layer follows in that model.
    """

    name: str
    layer: Layer
    model: Layer
    inputs: list[Tensor]
    is_last: bool


def output_activation(model: Layer) -> str | None:
    """The name of the activation at the end of a model with one output.

    Layers after it that keep its values (a reshape, a cast) are skipped, and models inside the
    model are opened.

    Returns:
        "softmax", "sigmoid", ..., "linear" without an activation, or None if it is not known,
        as for models that are neither functional nor Sequential or have several outputs.

    Example:
        >>> import tensorflow as tf
        >>> dense = tf.keras.layers.Dense
        >>> model = tf.keras.Sequential([tf.keras.Input((4,)), dense(3, "softmax")])
        >>> output_activation(model)
        'softmax'
    """
    end = _end(backend_of(model), model)
    return None if end is None else end.name


def like_softmax(outputs: np.ndarray) -> bool:
    """Whether outputs (batch, classes) are non-negative with the sum 1."""
    y = outputs.astype("float64")
    return bool((y >= 0).all() and np.abs(y.sum(1) - 1).max() < _SUM_TOLERANCE)


def without_output_activation(model: Layer) -> Layer:
    """The model without the activation at its end. The layers of ``model`` change.

    Args:
        model: A functional or Sequential model, for example a copy.

    Raises:
        ValueError: if the activation cannot be removed.
    """
    backend = backend_of(model)
    end = _end(backend, model)
    if end is not None and all(map(backend.is_rebuilt_with_layers, (model, end.model))):
        linear = backend.keras.activations.linear
        if callable(getattr(end.layer, "activation", None)):
            end.layer.activation = linear
            return model
        if end.model is model and len(end.inputs) == 1:
            return backend.keras.Model(model.input, end.inputs[0], name=model.name)
    raise ValueError(
        f"The activation at the end of model '{model.name}' ({type(model).__name__}) cannot be "
        "removed; expected a functional or Sequential model that ends in a layer with "
        "activation='softmax' or in a Softmax layer. Export the probabilities."
    )


@contextlib.contextmanager
def returning_logits(model: Layer) -> Iterator[bool]:
    """Within this block calls of a model return what its softmax or sigmoid is applied to.

    Yields:
        False if it is not known what the model ends in; it is then left as it is.
    """
    backend = backend_of(model)
    end = _end(backend, model)
    if end is None or end.name not in PROBABILITIES:
        yield end is not None
    elif callable(activation := getattr(end.layer, "activation", None)):
        end.layer.activation = backend.keras.activations.linear
        try:
            yield True
        finally:
            end.layer.activation = activation
    else:
        with backend.calls_replaced([(end.layer, lambda call, x, *args, **kwargs: x)]):
            yield True


def with_activation(model: Layer, activation: str, symbolic_input: Callable[[], Any]) -> Layer:
    """The model with a softmax or sigmoid at its end. The layers of ``model`` change.

    The last Dense layer of a functional or Sequential model applies it. Other models are
    followed by a Softmax or Activation layer.

    Args:
        model: A model that returns logits, for example a copy.
        activation: "softmax" or "sigmoid".
        symbolic_input: Creates the symbolic input of a model that is neither functional nor
            Sequential.
    """
    backend = backend_of(model)
    keras = backend.keras
    end = _end(backend, model)
    if (
        end is not None
        and end.is_last
        and end.name == "linear"
        and isinstance(end.layer, keras.layers.Dense)
        and all(map(backend.is_rebuilt_with_layers, (model, end.model)))
    ):
        end.layer.activation = getattr(keras.activations, activation)
        return model
    name = _new_name(model, activation)
    if activation == "softmax":
        last = keras.layers.Softmax(name=name)
    else:
        last = keras.layers.Activation(activation, name=name)
    if backend.is_functional(model) or isinstance(model, keras.Sequential):
        return keras.Model(model.input, last(model.output), name=model.name)
    inputs = symbolic_input()
    return keras.Model(inputs, last(model(inputs)), name=_new_name(model, "classifier"))


def _new_name(model: Layer, name: str) -> str:
    used = {model.name, *(layer.name for layer in getattr(model, "layers", ()))}
    while name in used:
        name += "_"
    return name


def _end(backend: Backend, model: Layer) -> _End | None:
    """The last activation of a model, or None if it is not known."""
    if not backend.is_functional(model):
        layers = model.layers if isinstance(model, backend.keras.Sequential) else []
        ends = [layer for layer in layers if not _keeps_values(layer)]
        last = ends[-1] if ends else None
        if last is None:
            return None
        return _end_at(backend, last, model, [], last is layers[-1])
    if len(model.outputs) != 1:
        return None
    last, inputs = backend.made_by(model.outputs[0])
    layer = last
    while _keeps_values(layer) and len(inputs) == 1:
        layer, inputs = backend.made_by(inputs[0])
    return _end_at(backend, layer, model, inputs, layer is last)


def _end_at(
    backend: Backend, layer: Layer, model: Layer, inputs: list[Tensor], is_last: bool
) -> _End | None:
    if backend.is_model(layer):
        end = _end(backend, layer)
        return None if end is None else end._replace(is_last=end.is_last and is_last)
    name = activation_name(layer)
    return None if name is None else _End(name, layer, model, inputs, is_last)


def _keeps_values(layer: Layer) -> bool:
    """Whether the outputs of a layer, or operation of Keras 3, are its inputs, reshaped."""
    return type(layer).__name__ in _SHAPES or (
        type(layer).__name__ == "Activation" and activation_name(layer) == "linear"
    )


def activation_name(layer: Layer) -> str | None:
    """The name of the activation that a layer applies, or None if it is not known."""
    if type(layer).__name__ == "Softmax":  # a layer, or an operation of Keras 3
        return "softmax"
    function = getattr(layer, "activation", None)
    if not callable(function):
        return None
    return str(getattr(function, "__name__", None) or type(function).__name__)
