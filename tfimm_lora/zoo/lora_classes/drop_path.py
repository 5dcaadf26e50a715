"""Stochastic depth (``DropPath``), which many of tfimm's architectures contain.

Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tfimm.layers.drop import DropPath

from tfimm_lora.backend.legacy_random import register_random_call


@register_random_call(DropPath)
def drop_path(layer: Any, random: Any, x: Any, training: bool = False) -> Any:
    """Zero each example with probability ``drop_prob``, and scale the others, as tfimm does."""
    if not training or not layer.drop_prob > 0:
        return x
    shape = (tf.shape(x)[0], *(1 for _ in x.shape[1:]))
    kept = tf.floor(layer.keep_prob + random.random_uniform(shape, dtype=x.dtype))
    return x / layer.keep_prob * kept
