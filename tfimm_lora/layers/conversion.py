"""Layer type -> LoRA type, and the conversion of one live layer, there and back."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of, default_backend
from tfimm_lora.backend.interface import Layer, OriginalLayer
from tfimm_lora.config import LayerSettings, with_settings_doc
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.call_signature import with_signature_of
from tfimm_lora.layers.conv import Conv1DUpdate, ConvUpdate, DepthwiseConvUpdate
from tfimm_lora.layers.dense import DenseUpdate
from tfimm_lora.layers.einsum_dense import EinsumDenseUpdate
from tfimm_lora.layers.embedding import EmbeddingUpdate
from tfimm_lora.layers.frozen import FrozenLayer, frozen_class, register_frozen_classes
from tfimm_lora.layers.kernel_hook import KernelHook
from tfimm_lora.layers.state import original_class, state_of

#: Keras class -> what adapts it. Its subclasses follow, unless they are listed below.
_UPDATES: dict[str, type[LoRALayer]] = {
    "Dense": DenseUpdate,
    "EinsumDense": EinsumDenseUpdate,
    "Embedding": EmbeddingUpdate,
    "Conv1D": Conv1DUpdate,
    "Conv2D": ConvUpdate,
    "Conv3D": ConvUpdate,
    "DepthwiseConv2D": DepthwiseConvUpdate,
}

#: Classes with another kind of kernel, some of which inherit from the ones above.
_OTHER_KERNELS = (
    "Conv1DTranspose",
    "Conv2DTranspose",
    "Conv3DTranspose",
    "SeparableConv1D",
    "SeparableConv2D",
    "DepthwiseConv1D",
)

_lora_classes: dict[type, type] = {}


def supported(layer: Layer) -> bool:
    """Whether LoRA has a class for layers of this type."""
    return _supported_base(type(layer)) is not None


def _supported_base(cls: type) -> type | None:
    """The Keras class through which ``cls`` is supported: Dense for a user's dense."""
    try:
        layers = backend_of(cls).keras.layers
    except TypeError:
        return None
    others = tuple(getattr(layers, n) for n in _OTHER_KERNELS if hasattr(layers, n))
    if issubclass(cls, others):
        return None
    # Depthwise first: in legacy Keras it is not a Conv2D, but it was in some versions.
    for name in sorted(_UPDATES, key=lambda name: name != "DepthwiseConv2D"):
        if issubclass(cls, getattr(layers, name)):
            found: type = getattr(layers, name)
            return found
    return None


def lora_class(cls: type) -> type:
    """The LoRA class of a layer class; made once, registered with Keras for loading.

    A subclass's LoRA class inherits from the LoRA class of its Keras base, so that an
    adapted ``PadConv2D`` is a ``LoRAConv2D`` and a ``PadConv2D``.

    Args:
        cls: ``Dense``, ``Conv2D``, ... of either Keras, or a subclass.

    Returns:
        The class.

    Raises:
        TypeError: if layers of this class cannot be adapted.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> lora.lora_class(tf.keras.layers.Dense).__name__
        'LoRADense'
    """
    if isinstance(cls, type) and issubclass(cls, LoRALayer):
        return cls
    if cls not in _lora_classes:
        base = _supported_base(cls) if isinstance(cls, type) else None
        if base is None:
            raise TypeError(
                f"Received {cls!r}, for which there is no LoRA version; expected a subclass "
                f"of one of {', '.join(_UPDATES)} (transposed and separable convolutions "
                "excepted)."
            )
        _lora_classes[cls] = _make_class(cls, base)
    return _lora_classes[cls]


def _make_class(cls: type, base: type) -> type:
    backend = backend_of(cls)
    update = _UPDATES[base.__name__]
    namespace: dict[str, Any] = {
        "__module__": "tfimm_lora.layers",
        "__doc__": with_settings_doc(update.__doc__ or "", LayerSettings),
    }
    if cls is base:
        attribute = backend.kernel_attributes[update._kernel_role]
        namespace[attribute] = KernelHook(attribute)
        namespace["_keras_class"] = cls
        bases: tuple[type, ...] = (update, backend.BuildHook, backend.FilteredWeights, cls)
    else:
        bases = (lora_class(base), cls)
    namespace["call"] = with_signature_of(cls, update)
    made = type(f"LoRA{cls.__name__}", bases, namespace)
    backend.register(made, "LoRA", cls)
    return made


def convert_to_lora_layer(layer: Any, **lora_arguments: Any) -> Any:
    """Turn a live layer into its LoRA version, in place.

    The layer keeps its identity, name, variables and connections; it gets another class
    and, now or when it is built, the variables ``kernel_lora_a`` and ``kernel_lora_b``.
    Its kernel is frozen, its bias too unless ``lora_train_bias``.

    Args:
        layer: A Dense, EinsumDense, Embedding, Conv1D/2D/3D or DepthwiseConv2D layer, or
            one of a subclass, built or not.
        **lora_arguments: lora_rank, lora_alpha, lora_dropout, lora_initializer,
            lora_regularizer, lora_train_bias; see ``LoRADense``.

    Returns:
        The same layer.

    Raises:
        TypeError: for an unknown argument, or a layer without a LoRA version.
        ValueError: for an argument out of range, a layer that is adapted already (by us or
            by Keras' enable_lora) or quantised, or one whose own ``call`` cannot take it.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> layer = tf.keras.layers.Dense(10)
        >>> lora.convert_to_lora_layer(layer, lora_rank=4) is layer
        True
        >>> type(layer).__name__
        'LoRADense'
    """
    settings = LayerSettings.from_arguments(lora_arguments, backend_of(layer).keras)
    return adapt_layer(layer, settings)


def adapt_layer(layer: Layer, settings: LayerSettings) -> Layer:
    """``convert_to_lora_layer`` with validated settings; on error the layer is unchanged."""
    if isinstance(layer, LoRALayer):
        raise ValueError(
            f"Layer '{layer.name}' is already adapted, with rank {layer.lora.rank}. Call "
            "remove_lora first to adapt it again."
        )
    if isinstance(layer, FrozenLayer):
        raise ValueError(
            f"Layer '{layer.name}' is frozen, as part of a model that LoRA was injected into. "
            "Name it in lora_targets when you inject LoRA."
        )
    cls: Any = lora_class(type(layer))
    cls.check_support(layer, settings)
    backend = backend_of(layer)
    original = backend.original(layer)
    try:
        backend.swap_class(layer, cls)
        backend.set_raw_trainable(layer, True)
        layer._attach(settings, original)
        if layer.built:
            layer.check_call()
    except BaseException:
        restore_layer(layer, original)
        raise
    return layer


def restore_layer(layer: Layer, original: OriginalLayer | None = None) -> Layer:
    """Turn a LoRA layer back into its original layer, without the update."""
    backend, state = backend_of(layer), state_of(layer)
    if state is not None:
        original = state.original or original
        if layer.merged:
            layer.unmerge_weights()
        layer._detach()
    if original is None:  # created adapted, or loaded from a file
        flags = backend.created_flags(layer)
        original = OriginalLayer(original_class(type(layer)), layer.trainable, flags)
    backend.restore(layer, original)
    return layer


def kernel_variable(layer: Layer) -> Any:
    """The kernel variable of a layer, adapted or not, of a kind that can be adapted."""
    base: Any = lora_class(type(layer))
    return layer.__dict__[backend_of(layer).kernel_attributes[base._kernel_role]]


def default_lora_layer(name: str) -> type:
    """``LoRADense``, ``LoRAConv2D``, ... of the Keras that this process uses.

    Raises:
        AttributeError: for another name.
    """
    base = name.removeprefix("LoRA")
    if base == name or base not in _UPDATES:
        raise AttributeError(f"module 'tfimm_lora.layers' has no attribute {name!r}")
    return lora_class(getattr(default_backend().keras.layers, base))


def register_keras_layers() -> None:
    """Make the LoRA and frozen versions of all layers of the default Keras known to it."""
    backend = default_backend()
    register_frozen_classes(backend)
    for name in _UPDATES:
        lora_class(getattr(backend.keras.layers, name))


def register_layer_classes(*classes: type) -> None:
    """Make layer classes of your own known to Keras in their LoRA and frozen versions.

    Call it before loading a whole-model file of a LoRA model that holds layers of these
    classes. Keras' own layers are known already.

    Args:
        *classes: Layer classes of either Keras.

    Raises:
        TypeError: for what is no layer class.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> class Mine(tf.keras.layers.Dense):
        ...     pass
        >>> lora.register_layer_classes(Mine)
    """
    for cls in classes:
        if not isinstance(cls, type) or not issubclass(cls, backend_of(cls).keras.layers.Layer):
            raise TypeError(f"Received {cls!r}; expected a Keras layer class.")
        for statistics in (False, True):
            frozen_class(cls, statistics)
        if _supported_base(cls) is not None:
            lora_class(cls)
