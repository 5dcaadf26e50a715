"""Which variables of a LoRA model are trained, as lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.layer_paths import is_suffix, nearest
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.validation import check_train_bias


def lora_trainable_weights(
    model: Any, train_bias: str = "none", trainable_layers: Sequence[str] | None = None
) -> list[Any]:
    """The variables of a LoRA model to train, in the order of its layers, each once.

    Args:
        model: A model, of any kind, with LoRA layers in it.
        train_bias: "none" (default): the factors A and B of every LoRA layer; "lora_only":
            also the biases of those layers; "all": also every bias-like variable (bias,
            beta, ..._bias) of every other layer.
        trainable_layers: Names of layers to train whole, each a path or the end of one,
            for example ["head/fc"]. Default none.

    Returns:
        A new list of variables.

    Raises:
        ValueError: for another ``train_bias``, a name that is no layer, or a built model
            without LoRA layers.

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
    """All variables of a model that ``lora_trainable_weights`` does not give.

    Args, Raises: as in ``lora_trainable_weights``.
    """
    return _split(model, train_bias, trainable_layers)[1]


def _split(
    model: Any, train_bias: str, trainable_layers: Sequence[str] | None
) -> tuple[list[Any], list[Any]]:
    check_train_bias(train_bias)
    backend = backend_of(model)
    layers = list(backend.walk(model))
    whole = layers_under(layers, trainable_layers or ())
    trained: list[Any] = []
    frozen: list[Any] = []
    seen: set[int] = set()
    for _, layer in layers:
        chosen = {id(v) for v in _trained_in(backend, layer, train_bias, id(layer) in whole)}
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


def _trained_in(backend: Any, layer: Any, train_bias: str, whole: bool) -> list[Any]:
    """The own variables of one layer that are trained."""
    trainable = backend.trainable_own_variables(layer)
    if whole:
        result: list[Any] = trainable
        return result
    biases = [v for v in trainable if backend.is_bias_like(v)]
    if isinstance(layer, LoRALayer):
        chosen = biases if train_bias != "none" else []
        factors = layer._lora_variables().values()
        return [*(v for v in factors if layer._is_trained(v)), *chosen]
    return biases if train_bias == "all" else []


def layers_under(layers: Iterable[tuple[str, Any]], names: Sequence[str]) -> set[int]:
    """The ids of the layers with these names and of all layers inside them.

    Raises:
        ValueError: for a name that is no layer of the model.
    """
    if isinstance(names, str):
        names = [names]
    layers = list(layers)
    roots = {name: [p for p, _ in layers if p and is_suffix(p, name)] for name in names}
    unknown = [name for name, paths in roots.items() if not paths]
    if unknown:
        near = nearest(unknown, [p for p, _ in layers if p])
        raise ValueError(
            f"Received layer names {unknown}, which are no layers of the model. Layers, "
            f"nearest first: {', '.join(near)}."
        )
    return inside_paths(layers, [p for found in roots.values() for p in found])


def inside_paths(layers: Iterable[tuple[str, Any]], paths: Sequence[str]) -> set[int]:
    """The ids of the layers with these whole paths and of all layers inside them."""
    return {
        id(layer)
        for path, layer in layers
        if any(path == p or path.startswith(p + "/") for p in paths)
    }
