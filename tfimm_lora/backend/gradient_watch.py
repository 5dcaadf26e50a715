"""Watching the gradients that an optimizer applies, as it applies them.

A callback sees no gradients, and how far an optimizer moves a weight is none (Adam's step is
near the learning rate whatever the gradient is). So the rule of the optimizer is wrapped in
the optimizer that trains: what is watched is computed in the compiled step itself, from the
gradient that is applied (unscaled, accumulated, clipped, summed over the devices), without a
second backward pass and without the gradients ever leaving the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

#: The methods of an optimizer that get gradients and variables; the second one in lists.
_ONE, _MANY, _COMPILED = "update_step", "_parallel_update_step", "_update_step_xla"


class Watcher(Protocol):
    """What is told of the updates of one variable."""

    #: The variable of the model.
    variable: Any

    @property
    def state(self) -> Sequence[Any]:
        """The variables that it assigns to, from ``state_variable``."""

    def before(self, gradient: Any, value: Any) -> None:
        """Called in the step with the dense gradient and the value that it is of."""

    def after(self, value: Any) -> Any:
        """Called in the step with the new value; gives the one to have instead."""


def state_variable(backend: Any, value: np.ndarray, beside: Any) -> Any:
    """A variable for a watcher, on the devices of the variable ``beside`` of a model."""
    with backend.variable_scope(beside):
        if hasattr(backend.keras, "Variable"):
            return backend.keras.Variable(value, trainable=False, dtype="float32")
        import tensorflow as tf

        return tf.Variable(value, trainable=False, dtype="float32")


def watch_updates(backend: Any, model: Any, watchers: Sequence[Watcher]) -> None:
    """Tell watchers of every update in the training of ``model`` that has begun.

    The train function is made anew. A watch of before is replaced.
    """
    unwatch_updates(backend, model)
    optimizer = _rule_of(model.optimizer)
    table = {optimizer._var_key(w.variable): w for w in watchers}

    def watched(method: Any) -> Any:
        def step(gradient: Any, variable: Any, *rest: Any) -> None:
            _update(backend, optimizer, table, method, [gradient], [variable], False, rest)

        return step

    def watched_list(method: Any) -> Any:
        def step(gradients: Any, variables: Any, *rest: Any) -> None:
            _update(backend, optimizer, table, method, gradients, variables, True, rest)

        return step

    # In the instance: its class, and so its config and its files, stay as they are.
    own = optimizer.__dict__
    own[_ONE] = watched(getattr(optimizer, _ONE))
    if hasattr(optimizer, _MANY):
        own[_MANY] = watched_list(getattr(optimizer, _MANY))
    if hasattr(optimizer, _COMPILED):
        import tensorflow as tf

        # Legacy Keras compiles it once for each optimizer and would go on with that.
        own[_COMPILED] = tf.function(
            lambda gradient, variable, key: optimizer._update_step(gradient, variable),
            jit_compile=True,
        )
    own["_lora_watched"] = [v for w in watchers for v in w.state]
    if backend.framework() == "jax":
        # There what a step changes is what the optimizer lists.
        optimizer._variables.extend(own["_lora_watched"])
        _note_placement(model)
    model.make_train_function(force=True)


def unwatch_updates(backend: Any, model: Any) -> None:
    """Undo ``watch_updates``, if it was done."""
    optimizer = _rule_of(model.optimizer)
    own = optimizer.__dict__
    if "_lora_watched" not in own:
        return
    state = {id(v) for v in own.pop("_lora_watched")}
    for method in (_ONE, _MANY, _COMPILED):
        own.pop(method, None)
    if backend.framework() == "jax":
        listed = optimizer._variables
        for variable in [v for v in listed if id(v) in state]:
            listed[:] = [v for v in listed if v is not variable]
        _note_placement(model)
    model.train_function = None


def _note_placement(model: Any) -> None:
    """Let Keras' trainer on JAX read again where the optimizer's variables are."""
    if hasattr(model, "_record_training_state_sharding_spec"):
        model._record_training_state_sharding_spec()


def _rule_of(optimizer: Any) -> Any:
    """The optimizer itself, of one within a loss scaling the inner one."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _update(
    backend: Any,
    optimizer: Any,
    table: dict[Any, Watcher],
    method: Any,
    gradients: Sequence[Any],
    variables: Sequence[Any],
    as_lists: bool,
    rest: tuple[Any, ...],
) -> None:
    """Apply gradients by a method of the optimizer, and tell the watchers."""
    watched = [(g, v, table.get(optimizer._var_key(v))) for g, v in zip(gradients, variables)]
    for gradient, variable, watcher in watched:
        if watcher is not None:
            watcher.before(_dense(gradient), backend.ops.cast(variable, "float32"))
    if as_lists:
        method(gradients, variables, *rest)
    else:
        method(gradients[0], variables[0], *rest)
    for _, variable, watcher in watched:
        if watcher is not None:
            variable.assign(watcher.after(backend.ops.cast(variable, "float32")))


def _dense(gradient: Any) -> Any:
    """A gradient as a tensor; that of looked-up rows has only those."""
    if type(gradient).__name__ != "IndexedSlices":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)
