"""Watch the gradients that an optimizer applies.

A callback does not see gradients, and they do not follow from the change of a weight (Adam's
step is close to the learning rate for any gradient). So the update method of the training
optimizer is wrapped: the watchers run in the compiled step itself, with the gradient that is
applied (unscaled, accumulated, clipped, summed over the devices), without a second backward
pass and without copying gradients from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tfimm_lora.backend.interface import Backend, Layer, Tensor, Variable

#: The methods of an optimizer that receive a gradient and a variable, or lists of them.
_ONE, _MANY, _COMPILED = "update_step", "_parallel_update_step", "_update_step_xla"


class Watcher(Protocol):
    """Watches the updates of one variable."""

    #: The variable of the model.
    variable: Variable

    @property
    def state(self) -> Sequence[Variable]:
        """The variables that it assigns to, from ``state_variable``."""

    def before(self, gradient: Tensor, value: Tensor) -> None:
        """Called before the update, with the dense gradient and the variable's value."""

    def after(self, value: Tensor) -> Tensor:
        """Called after the update, with the new value; return the value to assign."""


def state_variable(backend: Backend, value: np.ndarray, beside: Variable) -> Variable:
    """Create a variable for a watcher, on the devices of the model's variable ``beside``."""
    with backend.variable_scope(beside):
        if hasattr(backend.keras, "Variable"):
            return backend.keras.Variable(value, trainable=False, dtype="float32")
        import tensorflow as tf

        return tf.Variable(value, trainable=False, dtype="float32")


def watch_updates(backend: Backend, model: Layer, watchers: Sequence[Watcher]) -> None:
    """Call watchers for every update in the current training of ``model``.

    The train function is recreated. Earlier watchers are replaced.
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

    # Set in the instance, so that its class, its config and its files do not change.
    own = optimizer.__dict__
    own[_ONE] = watched(getattr(optimizer, _ONE))
    if hasattr(optimizer, _MANY):
        own[_MANY] = watched_list(getattr(optimizer, _MANY))
    if hasattr(optimizer, _COMPILED):
        import tensorflow as tf

        # Legacy Keras compiles it once for each optimizer, without the watchers.
        own[_COMPILED] = tf.function(
            lambda gradient, variable, key: optimizer._update_step(gradient, variable),
            jit_compile=True,
        )
    own["_lora_watched"] = [v for w in watchers for v in w.state]
    if backend.framework() == "jax":
        # On JAX a step only updates variables that the optimizer lists.
        optimizer._variables.extend(own["_lora_watched"])
        _record_sharding(model)
    model.make_train_function(force=True)


def unwatch_updates(backend: Backend, model: Layer) -> None:
    """Undo ``watch_updates``, if it was called."""
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
        _record_sharding(model)
    model.train_function = None


def _record_sharding(model: Layer) -> None:
    """Make Keras' trainer on JAX record the sharding of the optimizer's variables again."""
    if hasattr(model, "_record_training_state_sharding_spec"):
        model._record_training_state_sharding_spec()


def _rule_of(optimizer: Any) -> Any:
    """Return the optimizer itself, or the inner one of a LossScaleOptimizer."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _update(
    backend: Backend,
    optimizer: Any,
    table: dict[Any, Watcher],
    method: Any,
    gradients: Sequence[Any],
    variables: Sequence[Any],
    as_lists: bool,
    rest: tuple[Any, ...],
) -> None:
    """Apply gradients with a method of the optimizer, and call the watchers."""
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


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor; the gradient of an embedding is sparse."""
    if type(gradient).__name__ != "IndexedSlices":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)
