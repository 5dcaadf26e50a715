"""Layers of Keras 3 that are computed again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope

from tfimm_lora.backend import recompute
from tfimm_lora.backend.interface import Layer, Tensor, Variable

_CALL_CONTEXT = "current_call_ctx"

#: The id of a variable -> its value.
Values = dict[int, Tensor]


def recomputed_call(
    layer: Layer,
    trained: Sequence[Variable],
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """``call(*args, **kwargs)`` of a layer; see ``Backend``.

    Random layers and others that assign to variables do so in a ``StatelessScope``, whose
    values are assigned once, after the forward pass. So the second pass draws the same numbers.
    """
    given = recompute.Leaves(keras.tree, [args, kwargs], keras.ops.is_tensor)
    if any(_mask_of(x) is not None for x in given.tensors):
        raise recompute.masked_input(layer.name)
    around = get_stateless_scope()
    values = _current_values(layer)
    # Within a StatelessScope these are tensors that the scope has instead of variables.
    scoped = [id(v) for v in trained if id(v) in values]
    count, restored = len(given.tensors), _call_state()
    first: list[recompute.Leaves] = []

    def function(*tensors: Tensor) -> tuple[list[Tensor], Values]:
        args, kwargs = given.with_tensors(tensors[:count])
        before = {**values, **dict(zip(scoped, tensors[count:]))}
        with keras.StatelessScope(collect_losses=True) as scope, restored():
            scope.state_mapping.update(before)
            nested = call(*args, **kwargs)
        if scope.losses:
            raise recompute.added_loss(layer.name)
        outputs = recompute.Leaves(keras.tree, nested, keras.ops.is_tensor)
        if not first:
            first.append(outputs)
        mapping = scope.state_mapping.items()
        return outputs.tensors, {k: v for k, v in mapping if v is not before.get(k)}

    tensors = [*given.tensors, *(values[key] for key in scoped)]
    found, assigned = _with_gradient(layer, function, tensors, trained)
    variables = {id(v): v for v in layer.variables}
    for key, value in assigned.items():
        if key in variables:
            # The second pass begins with the value from before, too.
            values.setdefault(key, variables[key].value * 1)
            variables[key].assign(value)
        elif around is not None and key in around.state_mapping:
            around.state_mapping[key] = value
        else:
            raise recompute.changed_state(
                layer.name, "a variable of another layer or a seed generator of its own"
            )
    return first[0].with_tensors(found)


def _current_values(layer: Layer) -> Values:
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
    layer: Layer,
    function: Callable[..., tuple[list[Tensor], Values]],
    tensors: list[Tensor],
    trained: Sequence[Variable],
) -> tuple[list[Tensor], Values]:
    """The function of tensors, which is computed again for its gradient."""
    framework = keras.backend.backend()
    if framework == "jax":
        import jax

        return jax.checkpoint(function)(*tensors)  # type: ignore[no-any-return]
    first: list[Values] = []

    def outputs_of(*tensors: Tensor) -> list[Tensor]:
        outputs, assigned = function(*tensors)
        first.append(assigned)
        return outputs

    scope = get_stateless_scope()
    with AutocastScope(None):  # which would return another tensor than that of the variable
        own = [v.value for v in trained if scope is None or id(v) not in scope.state_mapping]
    if framework == "torch":
        from tfimm_lora.backend import torch_recompute

        outputs = torch_recompute.recomputed(outputs_of, tensors, own)
    else:
        from tfimm_lora.backend import tensorflow_recompute

        context = global_state.get_global_attribute(_CALL_CONTEXT)
        training = getattr(context, "training", None) is True
        outputs = tensorflow_recompute.recomputed(layer, outputs_of, tensors, own, training)
    return outputs, first[0]


def _mask_of(x: Tensor) -> Tensor | None:
    """The mask that Keras attached to a tensor, as an attribute or, on JAX, in a table."""
    try:
        from keras.src.backend.common.masking import get_keras_mask
    except ImportError:  # older versions have the attribute only
        return getattr(x, "_keras_mask", None)
    return get_keras_mask(x)
