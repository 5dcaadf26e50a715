"""The way back through legacy Keras' normalisations when their weights are frozen.

TensorFlow differentiates them as if scale and offset were trained: for batch normalisation in
inference mode its one operation computes all three gradients and needs the input again, layer
normalisation is differentiated term by term. With frozen weights less is to do:

* batch normalisation: y = k x + c with k = gamma / sqrt(variance + epsilon) for each channel, so
  dx = k dy, and the input is not kept.
* layer normalisation, with x' = x - mean(x), g = gamma dy, v = mean(x'^2) + epsilon and means
  over the axis that is normalised: dx = (g - mean(g) - x' mean(g x') / v) / sqrt(v).

References: Ioffe and Szegedy, arXiv:1502.03167, section 3; Ba et al., arXiv:1607.06450, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras

Gradient = Callable[[Any, Any], Any]

_BATCH_NORM = tf_keras.layers.BatchNormalization.call
_LAYER_NORM = tf_keras.layers.LayerNormalization.call

#: The ``call`` of the classes whose layers have such a gradient.
KNOWN_CALLS = (_BATCH_NORM, _LAYER_NORM)


def frozen_gradient(layer: Any, call: Any, x: Any) -> Gradient | None:
    """What gives the gradient by x from x and that by the output, or None to leave it to
    TensorFlow: for other layers than these, subclasses with a ``call`` of their own, and other
    types and axes than the common ones."""
    if call not in KNOWN_CALLS or not isinstance(x, tf.Tensor) or x.shape.rank is None:
        return None
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    last = axes in ([-1], [x.shape.rank - 1])
    if not last or not x.dtype.base_dtype.name == layer.compute_dtype == "float32":
        return None
    if call is _BATCH_NORM:
        return lambda x, dy: dy * _channel_factor(layer)
    if call is _LAYER_NORM:
        return lambda x, dy: _through_layer_norm(layer, x, dy)
    return None


def _channel_factor(layer: Any) -> Any:
    factor = tf.math.rsqrt(layer.moving_variance + layer.epsilon)
    return factor if layer.gamma is None else factor * layer.gamma


def _through_layer_norm(layer: Any, x: Any, dy: Any) -> Any:
    # Asked for as Keras does, so that TensorFlow finds them computed already.
    mean, variance = tf.nn.moments(x, layer.axis, keepdims=True)
    inverse = tf.math.rsqrt(variance + layer.epsilon)
    if layer.gamma is not None:
        dy = dy * layer.gamma
    centred = x - mean
    slope = tf.reduce_mean(dy * centred, -1, keepdims=True) * inverse**2
    return (dy - tf.reduce_mean(dy, -1, keepdims=True) - centred * slope) * inverse
