"""``FrozenLayer``: a layer of a LoRA model that is not adapted and keeps its values.

In a LoRA model every layer with variables of its own is either adapted, or frozen by this
class, or left alone because it is fully trained (a new classifier). Because this is done layer
by layer, every model that is built from these layers agrees on what is trained.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, OriginalLayer, Tensor, Variable
from tfimm_lora.layers.call_signature import check_super_calls, with_signature_of
from tfimm_lora.layers.compiled import compiled_call
from tfimm_lora.layers.depthwise import depthwise_mixins
from tfimm_lora.layers.normalization import folded, is_normalization, with_bias_of_example
from tfimm_lora.layers.state import (
    Converted,
    FrozenState,
    drop_state,
    original_class,
    set_state,
    state_of,
)
from tfimm_lora.layers.statistics import for_inference, has_known_statistics, has_statistics

#: The ids of the layers whose running call is in inference mode.
_in_inference: ContextVar[frozenset[int]] = ContextVar("in_inference", default=frozenset())

_copying_plain_layers: ContextVar[bool] = ContextVar("copying", default=False)


class FrozenLayer(Converted):
    """Mixin that freezes the own variables of a layer, all or all but its biases.

    Batch normalization then runs in inference mode, so that its statistics do not change.
    """

    name: str
    trainable: bool
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
        self._freeze_new_sublayers()
        self._sync_trainability()

    def _note_trainable(self, value: bool) -> None:
        """Warn if ``trainable = True`` has no effect on a frozen layer."""
        if not value or state_of(self) is None:
            return
        backend = backend_of(self)
        switched_on = not backend.raw_trainable(self)
        trains = backend.sublayers(self) or any(
            map(self._is_trained, backend.own_variables(self))
        )
        if switched_on and trains:
            return
        warnings.warn(
            f"Received trainable=True for layer '{self.name}', which LoRA froze: its weights "
            "stay frozen. To train them, name the layer in lora_train_modules (or pass "
            "lora_train_classifier=True) when you inject LoRA.",
            stacklevel=3,
        )

    def _freeze_new_sublayers(self) -> None:
        """Freeze the layers that this layer created after LoRA was injected."""
        state = self._lora_frozen
        if state.sublayers is None:
            return
        backend = backend_of(self)
        for child in backend.sublayers(self):
            if child in state.sublayers:
                continue
            state.sublayers.add(child)
            for _, layer in backend.walk(child):
                if state_of(layer) is None:
                    freeze_layer(layer, state.train_bias)
            warnings.warn(
                f"Layer '{self.name}' created layer '{child.name}' after LoRA was injected, so "
                "the new layer is frozen. To train it, call the model once with training=True "
                "before you inject LoRA, and name it in lora_train_modules.",
                stacklevel=3,
            )

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
    """Mixin for layers that have a cheaper gradient when they are frozen, and for
    normalizations, whose bias may differ by example in a mixed batch."""

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base_call = super().call  # type: ignore[misc]
        outputs = _with_frozen_gradient(self, base_call, inputs, *args, **kwargs)
        return with_bias_of_example(self, outputs)


class FrozenStatisticsLayer(FrozenLayer):
    """Mixin for layers with statistics, such as batch and spectral normalization: frozen, and
    always in inference mode.

    Layers that are not built yet are of this class, too, because only their variables show
    whether they have statistics.
    """

    @property
    def trainable(self) -> bool:
        # Batch normalization that is not trainable is in inference mode, also in a subclass
        # whose call asks for training.
        return super().trainable and id(self) not in _in_inference.get()

    @trainable.setter
    def trainable(self, value: bool) -> None:
        super(FrozenStatisticsLayer, type(self)).trainable.fset(self, value)  # type: ignore

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        base_call = super().call  # type: ignore[misc]
        state = self._lora_frozen
        if state.has_statistics is None:
            state.has_statistics = has_statistics(self)
        if not state.has_statistics:
            return base_call(*args, **kwargs)
        args, kwargs = for_inference(base_call, *args, **kwargs)
        token = _in_inference.set(_in_inference.get() | {id(self)})
        try:
            if not args:
                return base_call(**kwargs)
            x, *rest = args
            outputs = folded(self, lambda y: base_call(y, *rest, **kwargs), x)
            if outputs is None:
                outputs = _with_frozen_gradient(self, base_call, *args, **kwargs)
            return with_bias_of_example(self, outputs)
        finally:
            _in_inference.reset(token)


def keeps_statistics(layer: Layer) -> bool:
    """Whether a layer is frozen and always in inference mode, so that its statistics stay."""
    if not isinstance(layer, FrozenStatisticsLayer) or not has_statistics(layer):
        return False
    if isinstance(layer, backend_of(layer).keras.layers.BatchNormalization):
        return True
    cls: Any = original_class(type(layer))
    return "training" in inspect.signature(cls.call).parameters


def is_in_inference_unasked(layer: Layer) -> bool:
    """Whether a layer of a user's class is in inference mode because of a guess: it has
    statistics by no name that Keras uses, and is no normalization of Keras'."""
    backend, cls = backend_of(layer), original_class(type(layer))
    norm = getattr(backend.keras.layers, "BatchNormalization", ())
    return (
        keeps_statistics(layer)
        and not backend.is_keras_class(cls)
        and not issubclass(cls, norm)
        and not has_known_statistics(layer)
    )


def _with_frozen_gradient(layer: Layer, call: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the result of a bound ``call``: compiled, or with the cheaper gradient of a frozen
    layer for x, if there is one."""
    backend = backend_of(layer)
    if backend.prefers_plain_gradients():
        return call(x, *args, **kwargs)
    own_call = getattr(call, "__func__", None)
    if not args and not kwargs:
        compiled = compiled_call(backend, layer, own_call, x)
        if compiled is not None:
            return compiled
    gradient = backend.frozen_gradient(layer, own_call, x)
    if gradient is None:
        return call(x, *args, **kwargs)
    # The gradient of a trained bias still flows through y.
    y = call(backend.ops.stop_gradient(x), *args, **kwargs)
    return backend.custom_gradient(lambda x, y: (y, lambda dy: (gradient(x, dy), dy)), x, y)


#: Keras' layers around the modules of other frameworks, which may have statistics.
_WRAPPERS_OF_MODULES = ("JaxLayer", "FlaxLayer", "TorchModuleWrapper", "TFSMLayer")

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
        own_call = backend.has_frozen_gradient(cls) or is_normalization(backend, cls)
        plain = FrozenWithGradient if own_call else FrozenLayer
        mixin = FrozenStatisticsLayer if statistics else plain
        namespace: dict[str, Any] = {"__module__": __name__, "__doc__": mixin.__doc__}
        if mixin is not FrozenLayer:
            namespace["call"] = with_signature_of(cls, mixin)
        elif cls in _cheaper_calls:
            namespace["call"] = _cheaper_calls[cls]
        mixins = (mixin, backend.BuildHook, backend.FilteredWeights, *depthwise_mixins(cls))
        made = type(f"Frozen{cls.__name__}", (*mixins, cls), namespace)
        # A model's own class creates its layers, so it is refused when it is saved, and need
        # not be found by those who look through Keras' registry for models.
        if not issubclass(cls, backend.keras.Model) or backend.is_keras_class(cls):
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
            if "Normalization" in name or name in _WRAPPERS_OF_MODULES:
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
    check_super_calls(original.cls, layer.name)
    statistics = has_statistics(layer) or not (layer.built or backend.sublayers(layer))
    backend.swap_class(layer, frozen_class(original.cls, statistics))
    sublayers = weakref.WeakSet(backend.sublayers(layer))
    set_state(layer, FrozenState(original, train_bias, refusal, sublayers))
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
