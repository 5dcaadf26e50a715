"""GELU, SiLU and layer normalization, each compiled as one operation of TensorFlow.

On a CPU TensorFlow computes them term by term, and each term reads and writes memory: GELU
takes longer than the matrix product before it. XLA computes all terms in one pass, forward and
backward. The terms are float32, also for 16-bit inputs, and the result is rounded once.

With P(x) = erfc(-x / sqrt 2) / 2, s(x) = 1 / (1 + exp(-x)), and over the last axis
x' = x - mean(x), v = mean(x'^2) + epsilon, g = gamma dy:

* GELU: y = x P(x), dx = dy (P(x) + x exp(-x^2 / 2) / sqrt(2 pi)).
* SiLU: y = x s(x), dx = dy s(x) (1 + x (1 - s(x))).
* layer normalization: y = gamma x' / sqrt(v) + beta,
  dx = (g - mean(g) - x' mean(g x') / v) / sqrt(v).

References: Hendrycks and Gimpel, arXiv:1606.08415, section 2; Ba et al., arXiv:1607.06450,
section 3.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from tfimm_lora.backend.interface import Layer, Tensor

#: How many numbers an example has at least. There is little to save for smaller ones, and each
#: shape has to be compiled once.
LEAST = 4096

DTYPES = ("float32", "bfloat16", "float16")


def is_compiled(x: Tensor) -> bool:
    """Whether functions of a tensor are compiled: on CPUs, for large examples of one size."""
    sizes = x.shape[1:] if x.shape.rank else ()
    return (
        x.dtype.base_dtype.name in DTYPES
        and None not in sizes
        and math.prod(sizes) >= LEAST
        and _compiles_here()
    )


@functools.cache
def _compiles_here() -> bool:
    """Whether TensorFlow has no device but the CPU, and XLA for it."""
    if tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"):
        return False
    try:
        with tf.init_scope():
            tf.function(lambda x: x + x, jit_compile=True)(tf.constant(1.0))
    except tf.errors.OpError:
        return False
    return True


def gelu(x: Tensor) -> Tensor:
    """GELU as one operation, with its gradient."""
    return _with_gradient(_gelu, _gelu_gradient, x)


def silu(x: Tensor) -> Tensor:
    """SiLU as one operation, with its gradient."""
    return _with_gradient(_silu, _silu_gradient, x)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    """Layer normalization over the last axis as one operation, with the gradient of x."""
    epsilon = tf.constant(epsilon, tf.float32)
    return _with_gradient(_layer_norm, _layer_norm_gradient, x, gamma, beta, epsilon)


class CompiledLayers:
    """Which frozen layers and activations of a Keras are compiled, and their outputs."""

    def __init__(self, keras: Any) -> None:
        layers, activations = keras.layers, keras.activations
        self._activation = layers.Activation
        self._functions = {activations.gelu: gelu, activations.swish: silu}
        #: The ``call`` of the classes whose layers can be compiled.
        self.calls = (layers.LayerNormalization.call, layers.Activation.call)

    def has_known_activation(self, layer: Layer) -> bool:
        """Whether a layer is an Activation layer that can be compiled."""
        return type(layer) is self._activation and any(
            layer.activation is known for known in self._functions
        )

    def activated(self, activation: Any, x: Tensor) -> Tensor | None:
        """The activation of x, or None if it is not compiled."""
        # A callable of the user may have no hash.
        function = next((f for a, f in self._functions.items() if a is activation), None)
        if function is None or not isinstance(x, tf.Tensor) or not is_compiled(x):
            return None
        return function(x)

    def outputs(self, layer: Layer, call: Any, x: Tensor) -> Tensor | None:
        """The output of a frozen layer with this ``call``, or None if it is not compiled."""
        known = call in self.calls and isinstance(x, tf.Tensor)
        if not known or x.dtype.base_dtype.name != layer.compute_dtype:
            return None
        if call is self._activation.call:
            return self.activated(layer.activation, x)
        if not is_compiled(x) or not _is_plain_layer_norm(layer, x.shape.rank):
            return None
        size = x.shape[-1]
        gamma = tf.ones(size) if layer.gamma is None else tf.convert_to_tensor(layer.gamma)
        beta = tf.zeros(size) if layer.beta is None else tf.convert_to_tensor(layer.beta)
        return layer_norm(x, gamma, beta, layer.epsilon)


def _is_plain_layer_norm(layer: Layer, rank: int) -> bool:
    """Whether a layer normalizes over the last axis, with nothing that is trained."""
    # Keras 3 has a variant without the mean.
    return (
        axes_of(layer) in ([-1], [rank - 1])
        and not layer.trainable_weights
        and not getattr(layer, "rms_scaling", False)
    )


def axes_of(layer: Layer) -> Sequence[int]:
    """The axes over which a layer normalizes, or that of the channels."""
    return [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)


def _with_gradient(
    function: Callable[..., Tensor], gradient: Callable[..., Tensor], x: Tensor, *rest: Tensor
) -> Tensor:
    with record.stop_recording():
        y = function(x, *rest)

    def attached(x: Tensor, y: Tensor) -> Any:
        def grad(dy: Tensor) -> Any:
            # The way back through tf.cond finds what its operations read, but not what its
            # functions are given.
            kept = [tf.identity(tensor) for tensor in (x, *rest)]
            return gradient(kept[0], dy, *kept[1:]), None

        return y, grad

    return tf.custom_gradient(attached)(x, y)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The compiled function, whose result has the dtype of its first argument."""

    @functools.wraps(function)
    def call(*args: Tensor) -> Tensor:
        result = function(*(tf.cast(x, tf.float32) for x in args))
        return tf.cast(result, args[0].dtype)

    compiled: Callable[..., Tensor] = tf.function(call, jit_compile=True, autograph=False)
    return compiled


@_in_float32
def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * tf.math.erfc(-math.sqrt(0.5) * x)


@_in_float32
def _gelu_gradient(x: Tensor, dy: Tensor) -> Tensor:
    z = -math.sqrt(0.5) * x
    slope = tf.math.erfc(z) - 2 / math.sqrt(math.pi) * z * tf.exp(-tf.square(z))
    return 0.5 * dy * slope


@_in_float32
def _silu(x: Tensor) -> Tensor:
    return x * tf.sigmoid(x)


@_in_float32
def _silu_gradient(x: Tensor, dy: Tensor) -> Tensor:
    s = tf.sigmoid(x)
    return dy * s * (1 + x * (1 - s))


@_in_float32
def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: Tensor) -> Tensor:
    centred, inverse = _standardised(x, epsilon)
    return centred * inverse * gamma + beta


@_in_float32
def _layer_norm_gradient(
    x: Tensor, dy: Tensor, gamma: Tensor, beta: Tensor, epsilon: Tensor
) -> Tensor:
    centred, inverse = _standardised(x, epsilon)
    dy = dy * gamma
    slope = tf.reduce_mean(dy * centred, -1, keepdims=True) * inverse**2
    return (dy - tf.reduce_mean(dy, -1, keepdims=True) - centred * slope) * inverse


def _standardised(x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its mean, and one over the standard deviation."""
    mean, variance = tf.nn.moments(x, -1, keepdims=True)
    return x - mean, tf.math.rsqrt(variance + epsilon)
