"""``FrozenLayer``: a layer of a LoRA model that is not adapted and keeps its values.

In a LoRA model every layer with variables of its own is either adapted, or frozen by this
class, or left alone because it is fully trained (a new classifier). Because this is done layer
by layer, every model that is built from these layers agrees on what is trained.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, OriginalLayer, Tensor, Variable
from tfimm_lora.layers.call_signature import with_signature_of
from tfimm_lora.layers.state import (
    Converted,
    FrozenState,
    drop_state,
    original_class,
    set_state,
    state_of,
)

#: Own variables that mark a layer whose statistics change during training.
_STATISTICS = {"moving_mean", "moving_variance", "vector_u", "sn_u"}

_copying_plain_layers: ContextVar[bool] = ContextVar("copying", default=False)


class FrozenLayer(Converted):
    """Mixin that freezes the own variables of a layer, all or all but its biases.

    Batch normalization then runs in inference mode, so that its statistics do not change.
    """

    name: str
    _sync_trainability: Callable[[], None]

    @property
    def _lora_frozen(self) -> FrozenState:
        state = state_of(self)
        if not isinstance(state, FrozenState):  # created by from_config, not yet frozen
            state = FrozenState()
            set_state(self, state)
        return state

    def _is_trained(self, variable: Variable) -> bool:
        return self._lora_frozen.train_bias and backend_of(self).is_bias_like(variable)

    def _after_build(self) -> None:
        self._sync_trainability()

    def get_config(self) -> dict[str, Any]:
        state = self._lora_frozen
        copying = _copying_plain_layers.get()
        if state.refusal and not copying:
            raise ValueError(state.refusal)
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return config if copying else {**config, "lora_train_bias": state.train_bias}

    @classmethod
    def from_config(cls, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = dict(config)
        train_bias = config.pop("lora_train_bias", False)
        layer = super().from_config(config, *args, **kwargs)  # type: ignore[misc]
        set_state(layer, FrozenState(train_bias=train_bias))
        return layer


class FrozenWithGradient(FrozenLayer):
    """Mixin for layers that have a cheaper gradient when they are frozen."""

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_call = super().call  # type: ignore[misc]
        return _with_frozen_gradient(self, base_call, inputs, *args, **kwargs)


class FrozenStatisticsLayer(FrozenLayer):
    """Mixin for batch and spectral normalization: frozen, and always in inference mode."""

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_call = super().call  # type: ignore[misc]
        given = inspect.signature(base_call).bind_partial(inputs, *args, **kwargs)
        given.arguments["training"] = False
        return _with_frozen_gradient(self, base_call, *given.args, **given.kwargs)


def _with_frozen_gradient(layer: Layer, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a bound ``call``, with the cheaper gradient of a frozen layer for x
    if there is one."""
    backend = backend_of(layer)
    gradient = backend.frozen_gradient(layer, call.__func__, x)
    if gradient is None:
        return call(x, *args, **kwargs)
    # The gradient of a trained bias still flows through y.
    y = call(backend.ops.stop_gradient(x), *args, **kwargs)
    return backend.custom_gradient(lambda x, y: (y, lambda dy: (gradient(x, dy), dy)), x, y)


_frozen_classes: dict[tuple[type, bool], type] = {}
_cheaper_calls: dict[type, Callable[..., Any]] = {}


def register_cheaper_call(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a ``call`` with the same result as that of ``cls`` and a cheaper gradient.

    This is a decorator. Layers of exactly this class use the function while they are part of
    a LoRA model.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        _cheaper_calls[cls] = call
        return call

    return register


def has_cheaper_call(layer: Layer) -> bool:
    """Whether freezing a layer makes its gradient cheaper, even if it has no variables."""
    return type(layer) in _cheaper_calls or backend_of(layer).gains_from_freezing(layer)


def frozen_class(cls: type, statistics: bool = False) -> type:
    """Return the class that freezes layers of class ``cls``.

    It is created once and registered with Keras for loading.
    """
    key = (cls, statistics)
    if key not in _frozen_classes:
        backend = backend_of(cls)
        plain = FrozenWithGradient if backend.has_frozen_gradient(cls) else FrozenLayer
        mixin = FrozenStatisticsLayer if statistics else plain
        namespace: dict[str, Any] = {"__module__": __name__, "__doc__": mixin.__doc__}
        if mixin is not FrozenLayer:
            namespace["call"] = with_signature_of(cls, mixin)
        elif cls in _cheaper_calls:
            namespace["call"] = _cheaper_calls[cls]
        bases = (mixin, backend.BuildHook, backend.FilteredWeights, cls)
        made = type(f"Frozen{cls.__name__}", bases, namespace)
        backend.register(made, "FrozenStatistics" if statistics else "Frozen", cls)
        _frozen_classes[key] = made
    return _frozen_classes[key]


def register_frozen_classes(backend: Backend) -> None:
    """Register the frozen classes of all layers of a Keras, so that files can be loaded."""
    layers = backend.keras.layers
    for name in dir(layers):
        cls = getattr(layers, name)
        if isinstance(cls, type) and issubclass(cls, layers.Layer) and cls is not layers.Layer:
            frozen_class(cls)
            if "Normalization" in name:
                frozen_class(cls, statistics=True)


def freeze_layer(layer: Layer, train_bias: bool, refusal: str | None = None) -> None:
    """Freeze the own variables of a layer, all or (``train_bias``) all but its biases.

    Args:
        layer: The layer.
        train_bias: Whether its bias-like variables are trained.
        refusal: Why it must not be saved as part of a whole model, or None.
    """
    backend = backend_of(layer)
    original = backend.original(layer)
    names = {backend.variable_name(v) for v in backend.own_variables(layer)}
    backend.swap_class(layer, frozen_class(original.cls, bool(names & _STATISTICS)))
    set_state(layer, FrozenState(original, train_bias, refusal))
    backend.set_raw_trainable(layer, True)
    layer._sync_trainability()


def unfreeze_layer(layer: Layer) -> None:
    """Undo ``freeze_layer``."""
    backend = backend_of(layer)
    original = layer._lora_frozen.original
    drop_state(layer)
    if original is None:  # loaded from a file
        flags = backend.created_flags(layer)
        original = OriginalLayer(original_class(type(layer)), layer.trainable, flags)
    backend.restore(layer, original)


@contextlib.contextmanager
def copying_plain_layers() -> Iterator[None]:
    """Make frozen layers return the configs of their original layers within this block."""
    token = _copying_plain_layers.set(True)
    try:
        yield
    finally:
        _copying_plain_layers.reset(token)
