"""Layers of Keras 3 that are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope

from tfimm_lora.backend.interface import (
    Layer,
    Tensor,
    added_loss_error,
    masked_input_error,
)

_CALL_CONTEXT = "current_call_ctx"


def recomputed_call(layer: Layer, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``call(*args, **kwargs)`` of a layer; see ``Backend``.

    Random layers and others that assign to variables do so in a ``StatelessScope``, whose
    values are assigned once, after the forward pass. So the second pass draws the same numbers.
    """
    flat = keras.tree.flatten([args, kwargs])
    places = [i for i, x in enumerate(flat) if keras.ops.is_tensor(x)]
    if any(_mask_of(flat[place]) is not None for place in places):
        raise masked_input_error(layer.name)
    structure = [args, kwargs]
    values = _current_values(layer)
    restored = _call_state()

    def function(*tensors: Tensor) -> tuple[Any, dict[int, Tensor]]:
        leaves = list(flat)
        for place, tensor in zip(places, tensors):
            leaves[place] = tensor
        args, kwargs = keras.tree.pack_sequence_as(structure, leaves)
        with keras.StatelessScope(collect_losses=True) as scope, restored():
            scope.state_mapping.update(values)
            outputs = call(*args, **kwargs)
        if scope.losses:
            raise added_loss_error(layer.name)
        assigned = {k: v for k, v in scope.state_mapping.items() if v is not values.get(k)}
        return outputs, assigned

    tensors = [flat[place] for place in places]
    outputs, assigned = _with_gradient(layer, function, tensors)
    variables = {id(v): v for v in layer.variables}
    for key, value in assigned.items():
        variables[key].assign(value)
    return outputs


def _current_values(layer: Layer) -> dict[int, Tensor]:
    """The values that the scope around has, and those of the states of random layers."""
    scope = get_stateless_scope()
    values = dict(scope.state_mapping) if scope is not None else {}
    for inside in (layer, *layer._flatten_layers(include_self=False)):
        for generator in inside._seed_generators:
            state = generator.state
            values[id(state)] = state.value * 1  # a copy, because it is assigned to in place
    return values


def _call_state() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What Keras sets while it calls a layer, which it does not in the backward pass."""
    context = global_state.get_global_attribute(_CALL_CONTEXT)
    autocast = get_autocast_scope()

    @contextlib.contextmanager
    def restored() -> Iterator[None]:
        before = global_state.get_global_attribute(_CALL_CONTEXT)
        global_state.set_global_attribute(_CALL_CONTEXT, context)
        try:
            with AutocastScope(None if autocast is None else autocast.dtype):
                yield
        finally:
            global_state.set_global_attribute(_CALL_CONTEXT, before)

    return restored


def _with_gradient(
    layer: Layer, function: Callable[..., tuple[Any, Any]], tensors: list[Tensor]
) -> tuple[Any, dict[int, Tensor]]:
    """The function of tensors, which is computed again for its gradient."""
    framework = keras.backend.backend()
    if framework == "jax":
        import jax

        return jax.checkpoint(function)(*tensors)  # type: ignore[no-any-return]
    first: list[Any] = []

    def outputs_of(*tensors: Tensor) -> Any:
        outputs, assigned = function(*tensors)
        first.append(assigned)
        return outputs

    if framework == "torch":
        from tfimm_lora.backend import torch_recompute as recompute
    else:
        from tfimm_lora.backend import tensorflow_recompute as recompute  # type: ignore
    with AutocastScope(None):  # which would return another tensor than that of the variable
        trained = [v.value for v in layer.trainable_variables]
    return recompute.recomputed(outputs_of, tensors, trained, layer.name), first[0]


def _mask_of(x: Tensor) -> Tensor | None:
    """The mask that Keras attached to a tensor, as an attribute or, on JAX, in a table."""
    try:
        from keras.src.backend.common.masking import get_keras_mask
    except ImportError:  # older versions have the attribute only
        return getattr(x, "_keras_mask", None)
    return get_keras_mask(x)
