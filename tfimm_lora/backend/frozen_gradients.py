"""Cheaper gradients for frozen layers of legacy Keras.

TensorFlow differentiates normalization layers as if scale and offset were trained: for batch
normalization in inference mode one operation computes all three gradients and needs the input
again. Functions without an operation of their own are differentiated term by term, and most of
the terms are kept in memory. With frozen weights there is less to compute:

* batch normalization: y = k x + c with k = gamma / sqrt(variance + epsilon) for each channel,
  so dx = k dy, and the input is not kept.
* layer normalization, with x' = x - mean(x), g = gamma dy, v = mean(x'^2) + epsilon and means
  over the normalized axis: dx = (g - mean(g) - x' mean(g x') / v) / sqrt(v).
* GELU, y = x P(x) with P(x) = erfc(-x / sqrt 2) / 2: dx = dy (P(x) + x P'(x)), with
  P'(x) = exp(-x^2 / 2) / sqrt(2 pi); of these terms only P(x) is kept.

Where XLA can compile them on the CPU, layer normalization, GELU and SiLU are compiled instead
(``compiled_layers.py``), for large inputs.

References: Ioffe and Szegedy, arXiv:1502.03167, section 3; Ba et al., arXiv:1607.06450,
section 3; Hendrycks and Gimpel, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras

from tfimm_lora.backend.compiled_layers import CompiledLayers, axes_of
from tfimm_lora.backend.interface import Layer, Tensor

Gradient = Callable[[Tensor, Tensor], Tensor]

_BATCH_NORM = tf_keras.layers.BatchNormalization.call
_ACTIVATION = tf_keras.layers.Activation.call

#: The layers that are compiled. They and batch normalization, if it is in inference mode, have
#: such gradients.
COMPILED = CompiledLayers(tf_keras)


def frozen_gradient(layer: Layer, call: Any, x: Tensor) -> Gradient | None:
    """Return a function that computes the gradient of x from x and the output's gradient.

    For batch normalization it is valid in inference mode. For all other layers, subclasses with
    their own ``call``, and unusual dtypes and axes the result is None, so that TensorFlow
    computes the gradient.
    """
    known = (
        call in (*COMPILED.calls, _BATCH_NORM)
        and isinstance(x, tf.Tensor)
        and x.shape.rank is not None
    )
    if not known or not x.dtype.base_dtype.name == layer.compute_dtype == "float32":
        return None
    if call is _ACTIVATION:
        return _through_gelu if layer.activation is tf_keras.activations.gelu else None
    if axes_of(layer) not in ([-1], [x.shape.rank - 1]):
        return None
    # Variables are read now, because the backward pass of a tf.cond branch cannot read them.
    if call is _BATCH_NORM:
        factor = _channel_factor(layer)
        return lambda x, dy: dy * factor
    gamma = None if layer.gamma is None else tf.convert_to_tensor(layer.gamma)
    return lambda x, dy: _through_layer_norm(layer, gamma, x, dy)


def _through_gelu(x: Tensor, dy: Tensor) -> Tensor:
    # The same expressions as in Keras, so that TensorFlow does not compute them twice.
    z = -x * tf.cast(math.sqrt(0.5), x.dtype)
    twice = tf.math.erfc(z)
    return 0.5 * dy * (twice - 2 / math.sqrt(math.pi) * z * tf.exp(-tf.square(z)))


def _channel_factor(layer: Layer) -> Tensor:
    factor = tf.math.rsqrt(layer.moving_variance + layer.epsilon)
    return factor if layer.gamma is None else factor * layer.gamma


def _through_layer_norm(layer: Layer, gamma: Tensor | None, x: Tensor, dy: Tensor) -> Tensor:
    # The same expressions as in Keras, so that TensorFlow does not compute them twice.
    mean, variance = tf.nn.moments(x, layer.axis, keepdims=True)
    inverse = tf.math.rsqrt(variance + layer.epsilon)
    if gamma is not None:
        dy = dy * gamma
    centred = x - mean
    slope = tf.reduce_mean(dy * centred, -1, keepdims=True) * inverse**2
    return (dy - tf.reduce_mean(dy, -1, keepdims=True) - centred * slope) * inverse
