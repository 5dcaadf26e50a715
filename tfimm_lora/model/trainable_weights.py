"""List the trained and the frozen variables of a LoRA model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Variable
from tfimm_lora.layer_paths import is_suffix, nearest
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.validation import check_train_bias


def lora_trainable_weights(
    model: Any, train_bias: str = "none", trainable_layers: Sequence[str] | None = None
) -> list[Any]:
    """Return the variables of a LoRA model to train, in the order of its layers, each once.

    Args:
        model: Any model with LoRA layers.
        train_bias: "none" (default): the factors A and B of every LoRA layer; "lora_only":
            also the biases of these layers; "all": also every bias-like variable (bias,
            beta, ..._bias) of every other layer.
        trainable_layers: Names of layers to train fully, each a path or the end of one,
            for example ["head/fc"]. None (default) means no layer.

    Returns:
        A new list of variables.

    Raises:
        ValueError: If ``train_bias`` is not one of these, if a name is not a layer of the
            model, or if a built model has no LoRA layers.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> len(lora.lora_trainable_weights(model, train_bias="lora_only"))
        3
    """
    return _split(model, train_bias, trainable_layers)[0]


def lora_non_trainable_weights(
    model: Any, train_bias: str = "none", trainable_layers: Sequence[str] | None = None
) -> list[Any]:
    """Return all variables of a model that ``lora_trainable_weights`` does not return.

    Args, Raises: As in ``lora_trainable_weights``.
    """
    return _split(model, train_bias, trainable_layers)[1]


def _split(
    model: Any, train_bias: str, trainable_layers: Sequence[str] | None
) -> tuple[list[Any], list[Any]]:
    check_train_bias(train_bias)
    backend = backend_of(model)
    layers = list(backend.walk(model))
    fully_trained = layers_under(layers, trainable_layers or ())
    trained: list[Any] = []
    frozen: list[Any] = []
    seen: set[int] = set()
    for _, layer in layers:
        is_fully_trained = id(layer) in fully_trained
        chosen = {id(v) for v in _trained_in(backend, layer, train_bias, is_fully_trained)}
        for variable in backend.own_variables(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                (trained if id(variable) in chosen else frozen).append(variable)
    if seen and not any(isinstance(layer, LoRALayer) for _, layer in layers):
        raise ValueError(
            f"Received model '{model.name}', which has no LoRA layers. Convert it with "
            "convert_to_lora_model or inject_lora first."
        )
    return trained, frozen


def _trained_in(
    backend: Backend, layer: Layer, train_bias: str, is_fully_trained: bool
) -> list[Variable]:
    """Return the own variables of one layer that are trained."""
    trainable = backend.trainable_own_variables(layer)
    if is_fully_trained:
        return trainable
    biases = [v for v in trainable if backend.is_bias_like(v)]
    if isinstance(layer, LoRALayer):
        chosen = biases if train_bias != "none" else []
        factors = layer._lora_variables().values()
        return [*(v for v in factors if layer._is_trained(v)), *chosen]
    return biases if train_bias == "all" else []


def layers_under(layers: Iterable[tuple[str, Layer]], names: Sequence[str]) -> set[int]:
    """Return the ids of the layers with these names and of all layers inside them.

    Raises:
        ValueError: If a name is not a layer of the model.
    """
    if isinstance(names, str):
        names = [names]
    layers = list(layers)
    roots = {name: [p for p, _ in layers if p and is_suffix(p, name)] for name in names}
    unknown = [name for name, paths in roots.items() if not paths]
    if unknown:
        near = nearest(unknown, [p for p, _ in layers if p])
        raise ValueError(
            f"Received layer names {unknown}, which are not layers of the model. Layers, "
            f"nearest first: {', '.join(near)}."
        )
    return inside_paths(layers, [p for found in roots.values() for p in found])


def inside_paths(layers: Iterable[tuple[str, Layer]], paths: Sequence[str]) -> set[int]:
    """Return the ids of the layers with these full paths and of all layers inside them."""
    return {
        id(layer)
        for path, layer in layers
        if any(path == p or path.startswith(p + "/") for p in paths)
    }
