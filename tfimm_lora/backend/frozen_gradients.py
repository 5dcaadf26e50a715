"""The way back through layers of legacy Keras that are not trained.

TensorFlow differentiates normalisations as if scale and offset were trained: for that of
batches in inference mode its one operation computes all three gradients and needs the input
again. What it has no operation for it differentiates term by term, and keeps most of the terms.
With frozen weights less is to do:

* batch normalisation: y = k x + c with k = gamma / sqrt(variance + epsilon) for each channel,
  so dx = k dy, and the input is not kept.
* layer normalisation, with x' = x - mean(x), g = gamma dy, v = mean(x'^2) + epsilon and means
  over the axis that is normalised: dx = (g - mean(g) - x' mean(g x') / v) / sqrt(v).
* GELU, y = x P(x) with P(x) = erfc(-x / sqrt 2) / 2: dx = dy (P(x) + x P'(x)), with
  P'(x) = exp(-x^2 / 2) / sqrt(2 pi); of the terms P(x) alone is kept.

References: Ioffe and Szegedy, arXiv:1502.03167, section 3; Ba et al., arXiv:1607.06450,
section 3; Hendrycks and Gimpel, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras

Gradient = Callable[[Any, Any], Any]

_BATCH_NORM = tf_keras.layers.BatchNormalization.call
_LAYER_NORM = tf_keras.layers.LayerNormalization.call
_ACTIVATION = tf_keras.layers.Activation.call

#: The ``call`` of the classes whose layers may have such a gradient as they are. Batch
#: normalisation must be in inference mode, too.
CALLS = (_LAYER_NORM, _ACTIVATION)


def is_gelu(layer: Any) -> bool:
    """Whether a layer is nothing but a GELU."""
    known = type(layer) is tf_keras.layers.Activation
    return known and layer.activation is tf_keras.activations.gelu


def frozen_gradient(layer: Any, call: Any, x: Any) -> Gradient | None:
    """What gives the gradient by x from x and that by the output (of batch normalisation in
    inference mode), or None to leave it to TensorFlow: for other layers than these, subclasses
    with a ``call`` of their own, and other types and axes than the common ones."""
    known = (
        call in (*CALLS, _BATCH_NORM) and isinstance(x, tf.Tensor) and x.shape.rank is not None
    )
    if not known or not x.dtype.base_dtype.name == layer.compute_dtype == "float32":
        return None
    if call is _ACTIVATION:
        return _through_gelu if layer.activation is tf_keras.activations.gelu else None
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if axes not in ([-1], [x.shape.rank - 1]):
        return None
    # Variables are read now: the way back through a branch of tf.cond could not.
    if call is _BATCH_NORM:
        factor = _channel_factor(layer)
        return lambda x, dy: dy * factor
    gamma = None if layer.gamma is None else tf.convert_to_tensor(layer.gamma)
    return lambda x, dy: _through_layer_norm(layer, gamma, x, dy)


def _through_gelu(x: Any, dy: Any) -> Any:
    # Asked for as Keras does, so that TensorFlow finds both computed already.
    z = -x * tf.cast(math.sqrt(0.5), x.dtype)
    twice = tf.math.erfc(z)
    return 0.5 * dy * (twice - 2 / math.sqrt(math.pi) * z * tf.exp(-tf.square(z)))


def _channel_factor(layer: Any) -> Any:
    factor = tf.math.rsqrt(layer.moving_variance + layer.epsilon)
    return factor if layer.gamma is None else factor * layer.gamma


def _through_layer_norm(layer: Any, gamma: Any, x: Any, dy: Any) -> Any:
    # Asked for as Keras does, so that TensorFlow finds them computed already.
    mean, variance = tf.nn.moments(x, layer.axis, keepdims=True)
    inverse = tf.math.rsqrt(variance + layer.epsilon)
    if gamma is not None:
        dy = dy * gamma
    centred = x - mean
    slope = tf.reduce_mean(dy * centred, -1, keepdims=True) * inverse**2
    return (dy - tf.reduce_mean(dy, -1, keepdims=True) - centred * slope) * inverse
