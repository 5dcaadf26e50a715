"""Map layer classes to LoRA classes, and convert a live layer to LoRA and back."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of, default_backend
from tfimm_lora.backend.interface import Layer, OriginalLayer, Variable
from tfimm_lora.config import LayerSettings, with_settings_doc
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.call_signature import with_signature_of
from tfimm_lora.layers.conv import Conv1DUpdate, ConvUpdate, DepthwiseConvUpdate
from tfimm_lora.layers.dense import DenseUpdate
from tfimm_lora.layers.depthwise import depthwise_mixins
from tfimm_lora.layers.einsum_dense import EinsumDenseUpdate
from tfimm_lora.layers.embedding import EmbeddingUpdate
from tfimm_lora.layers.frozen import FrozenLayer, frozen_class, register_frozen_classes
from tfimm_lora.layers.kernel_hook import KernelHook
from tfimm_lora.layers.state import original_class, state_of

#: Keras class -> mixin that adapts it and its subclasses, except for those listed below.
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
    """Whether layers of this type can be adapted."""
    return _supported_base(type(layer)) is not None


def _supported_base(cls: type) -> type | None:
    """Return the Keras class that makes ``cls`` supported: Dense for a subclass of Dense."""
    try:
        layers = backend_of(cls).keras.layers
    except TypeError:
        return None
    others = tuple(getattr(layers, n) for n in _OTHER_KERNELS if hasattr(layers, n))
    if issubclass(cls, others):
        return None
    # Depthwise first, since it is a subclass of Conv2D in some versions of legacy Keras.
    for name in sorted(_UPDATES, key=lambda name: name != "DepthwiseConv2D"):
        if issubclass(cls, getattr(layers, name)):
            found: type = getattr(layers, name)
            return found
    return None


def lora_class(cls: type) -> type:
    """Return the LoRA class of a layer class.

    It is created once and registered with Keras for loading.

    A subclass's LoRA class inherits from the LoRA class of its Keras base, so that an
    adapted ``PadConv2D`` is a ``LoRAConv2D`` and a ``PadConv2D``.

    Args:
        cls: ``Dense``, ``Conv2D``, ... of legacy Keras or Keras 3, or a subclass.

    Returns:
        The class.

    Raises:
        TypeError: If layers of this class cannot be adapted.

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
                f"of one of {', '.join(_UPDATES)} (but not of a transposed or separable "
                "convolution)."
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
        mixins = (update, backend.BuildHook, backend.FilteredWeights, *depthwise_mixins(cls))
        bases: tuple[type, ...] = (*mixins, cls)
    else:
        bases = (lora_class(base), cls)
    namespace["call"] = with_signature_of(cls, update)
    made = type(f"LoRA{cls.__name__}", bases, namespace)
    backend.register(made, "LoRA", cls)
    return made


def convert_to_lora_layer(layer: Any, **lora_arguments: Any) -> Any:
    """Convert a live layer to its LoRA version, in place.

    The layer keeps its identity, name, variables and connections. It gets another class and,
    now or when it is built, the variables ``kernel_lora_a`` and ``kernel_lora_b``. Its kernel
    is frozen, and also its bias unless ``lora_train_bias`` is true.

    Args:
        layer: A Dense, EinsumDense, Embedding, Conv1D/2D/3D or DepthwiseConv2D layer, or
            one of a subclass, built or not.
        **lora_arguments: lora_rank, lora_alpha, lora_dropout, lora_initializer,
            lora_regularizer, lora_train_bias; see ``LoRADense``.

    Returns:
        The same layer.

    Raises:
        TypeError: If an argument is unknown, or the layer has no LoRA version.
        ValueError: If an argument is out of range, if the layer is already adapted (by this
            package or by Keras' enable_lora) or quantized, or if its own ``call`` cannot be
            adapted.

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
    """Convert a layer with validated settings. On error the layer is not changed."""
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
    """Convert a LoRA layer back to its original layer, without the update."""
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


def kernel_variable(layer: Layer) -> Variable:
    """Return the kernel variable of an adapted layer, or of one that can be adapted."""
    base: Any = lora_class(type(layer))
    return layer.__dict__[backend_of(layer).kernel_attributes[base._kernel_role]]


def default_lora_layer(name: str) -> type:
    """Return ``LoRADense``, ``LoRAConv2D``, ... of the Keras that this process uses.

    Raises:
        AttributeError: If there is no such class.
    """
    base = name.removeprefix("LoRA")
    if base == name or base not in _UPDATES:
        raise AttributeError(f"module 'tfimm_lora.layers' has no attribute {name!r}")
    return lora_class(getattr(default_backend().keras.layers, base))


def register_keras_layers() -> None:
    """Register the LoRA and frozen versions of all layers of the default Keras."""
    backend = default_backend()
    register_frozen_classes(backend)
    for name in _UPDATES:
        lora_class(getattr(backend.keras.layers, name))


def register_layer_classes(*classes: type) -> None:
    """Register the LoRA and frozen versions of your own layer classes with Keras.

    Call this before loading a whole-model file of a LoRA model with layers of these classes.
    The versions of Keras' own layers are already registered.

    Args:
        *classes: Layer classes of legacy Keras or Keras 3.

    Raises:
        TypeError: If an argument is not a layer class.

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
