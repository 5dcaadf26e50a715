"""``FrozenLayer``: a layer of a LoRA model that is not adapted and stays as it is.

In a LoRA model every layer with variables of its own is either adapted, or frozen by this
class, or left alone because it is trained whole (a new classifier). Doing so layer by layer
makes every model that is built from these layers agree on what is trained.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Found
from tfimm_lora.layers.call_signature import with_signature_of

#: Own variables that mark a layer whose statistics move while training.
_STATISTICS = {"moving_mean", "moving_variance", "vector_u", "sn_u"}

_copying = threading.local()


class FrozenLayer:
    """Mixin that freezes the own variables of a layer, all or all but its biases.

    Batch normalisation then runs in inference mode, so that its statistics stay.
    """

    name: str
    _sync_trainability: Callable[[], None]

    @property
    def _lora_frozen(self) -> FrozenState:
        state = self.__dict__.get("_lora_frozen")
        if state is None:  # created by from_config, before its settings are known
            state = self.__dict__["_lora_frozen"] = FrozenState(False)
        return state

    def _is_trained(self, variable: Any) -> bool:
        return self._lora_frozen.train_bias and backend_of(self).is_bias_like(variable)

    def _after_build(self) -> None:
        self._sync_trainability()

    def get_config(self) -> dict[str, Any]:
        state = self._lora_frozen
        if _copies_plain_layers():
            return super().get_config()  # type: ignore[misc]
        if state.refusal:
            raise ValueError(state.refusal)
        config = super().get_config()  # type: ignore[misc]
        return {**config, "lora_train_bias": state.train_bias}

    @classmethod
    def from_config(cls, config: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = dict(config)
        train_bias = config.pop("lora_train_bias", False)
        layer = super().from_config(config, *args, **kwargs)  # type: ignore[misc]
        layer.__dict__["_lora_frozen"] = FrozenState(train_bias)
        return layer


class FrozenWithGradient(FrozenLayer):
    """Mixin for layers that have a cheaper gradient when they are frozen."""

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_frozen_gradient(self, super().call, inputs, *args, **kwargs)  # type: ignore[misc]


class FrozenStatisticsLayer(FrozenLayer):
    """Mixin for batch and spectral normalisation: frozen, and in inference mode always."""

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        base_call = super().call  # type: ignore[misc]
        given = inspect.signature(base_call).bind_partial(inputs, *args, **kwargs)
        given.arguments["training"] = False
        return _with_frozen_gradient(self, base_call, *given.args, **given.kwargs)


def _with_frozen_gradient(layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What a bound ``call`` gives, and to x the gradient that is cheaper when its layer is
    frozen, where there is one."""
    backend = backend_of(layer)
    gradient = backend.frozen_gradient(layer, call.__func__, x)
    if gradient is None:
        return call(x, *args, **kwargs)
    # To a bias that is trained goes through y what goes to it anyway.
    y = call(backend.ops.stop_gradient(x), *args, **kwargs)
    return backend.custom_gradient(lambda x, y: (y, lambda dy: (gradient(x, dy), dy)), x, y)


class FrozenState:
    """What a frozen layer knows beside being itself."""

    def __init__(self, train_bias: bool, found: Found | None = None) -> None:
        #: Whether its bias-like variables are trained.
        self.train_bias = train_bias
        #: How it was before; None if it was loaded from a file.
        self.found = found
        #: Why it must not be saved as part of a whole model, or None.
        self.refusal: str | None = None


_frozen_classes: dict[tuple[type, bool], type] = {}
_cheaper_calls: dict[type, Callable[..., Any]] = {}


def register_cheaper_call(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a ``call`` that gives what that of ``cls`` gives, with a cheaper gradient.
    Layers of just this class have it while LoRA is in their model."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        _cheaper_calls[cls] = call
        return call

    return register


def has_cheaper_call(layer: Any) -> bool:
    """Whether freezing a layer makes its gradient cheaper, even if it has no variables."""
    return type(layer) in _cheaper_calls or backend_of(layer).gains_from_freezing(layer)


def frozen_class(cls: type, statistics: bool = False) -> type:
    """The class that freezes layers of class ``cls``; made once, registered with Keras."""
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


def register_frozen_classes(backend: Any) -> None:
    """Make the frozen classes of all layers of a Keras known, for loading files."""
    layers = backend.keras.layers
    for name in dir(layers):
        cls = getattr(layers, name)
        if isinstance(cls, type) and issubclass(cls, layers.Layer) and cls is not layers.Layer:
            frozen_class(cls)
            if "Normalization" in name:
                frozen_class(cls, statistics=True)


def freeze_layer(layer: Any, train_bias: bool, refusal: str | None = None) -> None:
    """Freeze the own variables of a layer, all or (``train_bias``) all but its biases.

    ``refusal`` says why the layer must not be saved as part of a whole model.
    """
    backend = backend_of(layer)
    found = backend.found(layer)
    names = {backend.variable_name(v) for v in backend.own_variables(layer)}
    backend.swap_class(layer, frozen_class(found.cls, bool(names & _STATISTICS)))
    state = FrozenState(train_bias, found)
    state.refusal = refusal
    layer.__dict__["_lora_frozen"] = state
    backend.set_raw_trainable(layer, True)
    layer._sync_trainability()


def thaw_layer(layer: Any) -> None:
    """Undo ``freeze_layer``."""
    backend = backend_of(layer)
    found = layer._lora_frozen.found
    del layer.__dict__["_lora_frozen"]
    if found is None:  # loaded from a file
        cls = next(key[0] for key, made in _frozen_classes.items() if made is type(layer))
        found = Found(cls, layer.trainable, backend.created_flags(layer))
    backend.restore(layer, found)


@contextlib.contextmanager
def copying_plain_layers() -> Iterator[None]:
    """Within this block frozen layers give the configs of the layers they were."""
    before = _copies_plain_layers()
    _copying.active = True
    try:
        yield
    finally:
        _copying.active = before


def _copies_plain_layers() -> bool:
    return getattr(_copying, "active", False)
