"""Let the classifier of a model return numbers in other units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.output_activation import activation_name, output_activation


def absorb_scale(model: Layer, mean: Sequence[float], std: Sequence[float]) -> None:
    """Change a model that returns y so that it returns mean + std * y.

    The kernel W and bias b of its last layer become W std and b std + mean, so nothing is added
    to the model. If several layers compute the outputs, as the mean of theirs, all are changed.

    Args:
        model: An ordinary model, whose weights change.
        mean, std: A number for each output.

    Raises:
        ValueError: as ``scalable_heads``. The model is unchanged then.

    Example:
        >>> import numpy as np, tensorflow as tf
        >>> from tfimm_lora.model.output_scale import absorb_scale
        >>> model = tf.keras.Sequential([tf.keras.Input((1,)), tf.keras.layers.Dense(1)])
        >>> model.set_weights([np.array([[2.0]]), np.array([1.0])])
        >>> absorb_scale(model, mean=[100.0], std=[10.0])
        >>> float(model(np.array([[3.0]]))[0, 0])  # 100 + 10 * 7
        170.0
    """
    heads = scalable_heads(model)
    to_numpy = backend_of(model).to_numpy
    offset, factor = np.asarray(mean, "float64"), np.asarray(std, "float64")
    for head in heads:
        kernel, bias = (to_numpy(v).astype("float64") for v in (head.kernel, head.bias))
        head.kernel.assign((kernel * factor).astype("float32"))
        head.bias.assign((bias * factor + offset).astype("float32"))


def scaled(outputs: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """mean + std * outputs, for outputs (n, k), in float64."""
    result: np.ndarray = np.asarray(mean) + np.asarray(std) * np.asarray(outputs, "float64")
    return result


def standardised(values: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(values - mean) / std, for values (n, k), in float64."""
    result: np.ndarray = (np.asarray(values, "float64") - np.asarray(mean)) / np.asarray(std)
    return result


def scalable_heads(model: Layer) -> list[Any]:
    """The layers that compute the outputs of a model.

    Raises:
        ValueError: if their outputs are not linear, or they have no bias.
    """
    backend = backend_of(model)
    layers, paths = dict(backend.walk(model)), classifier_paths(model)
    heads: list[Any] = [layers[path] for path in paths]
    kinds = (backend.keras.layers.Dense, backend.keras.layers.Conv2D)
    known = bool(heads) and all(isinstance(head, kinds) and head.use_bias for head in heads)
    linear = (None, "linear")
    if (
        not known
        or output_activation(model) not in linear
        or any(activation_name(head) not in linear for head in heads)
    ):
        raise ValueError(
            f"The outputs of model '{model.name}' cannot be scaled to the units of numbers: "
            f"they are computed by {', '.join(paths) or 'no known layer'}; expected a Dense "
            "layer, or a 1x1 convolution, with a bias and without an activation at the end of "
            "the model."
        )
    return heads
