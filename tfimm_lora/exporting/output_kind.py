"""What the outputs of a model are: logits or probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.model.classifier import classifier_names, classifier_paths
from tfimm_lora.model.output_activation import PROBABILITIES, like_softmax, output_activation
from tfimm_lora.model.state import recorded_task

LOGITS, PROBABILITY, NUMBERS = "logits", "probabilities", "numbers"

#: The task whose outputs are those of each pixel.
SEGMENTATION = "segmentation"


def kind_of(model: Any, outputs: Outputs) -> str | None:
    """The kind of the outputs of a model.

    Args:
        model: The model.
        outputs: Its outputs for a few inputs.

    Returns:
        "probabilities" if the model ends in a softmax or sigmoid, or if all outputs are
        non-negative with the sum 1; "logits" for other outputs of a classifier; "numbers" for
        those of a regression; None if the model has several outputs, or its single output is
        not known to be one of a classifier.
    """
    if len(outputs) != 1:
        return None
    (y,) = outputs.values()
    activation, task = output_activation(model), recorded_task(model)
    if task is not None and task.activation is None:
        return NUMBERS
    if activation in PROBABILITIES:
        return PROBABILITY
    if task is not None and task.activation == "sigmoid":
        return LOGITS
    is_dense = task is not None and task.name == SEGMENTATION
    if is_dense and y.ndim == 4 and activation in (None, "linear"):
        return LOGITS
    if y.ndim != 2 or y.shape[1] < 2:
        return None
    if activation is not None:
        return LOGITS if activation == "linear" else None
    if like_softmax(y):
        return PROBABILITY
    # The end of the model is not known. After a ReLU, for example, no output is negative.
    # The classifiers of tfimm return logits.
    is_logits = classifier_names(getattr(model, "cfg", None)) or (y < 0).any()
    return LOGITS if classifier_paths(model) and is_logits else None


def softmax_of(outputs: Outputs) -> Outputs:
    """The softmax of all outputs along the last axis, computed in float64."""
    return {name: _softmax(y) for name, y in outputs.items()}


def activated(outputs: Outputs, activation: str | None) -> Outputs:
    """The outputs after the activation "sigmoid", or else a softmax."""
    if activation == "sigmoid":
        return {k: 0.5 * (1 + np.tanh(0.5 * y.astype("float64"))) for k, y in outputs.items()}
    return softmax_of(outputs)


def _softmax(y: np.ndarray) -> np.ndarray:
    e: np.ndarray = np.exp(y.astype("float64") - y.max(-1, keepdims=True))
    result: np.ndarray = e / e.sum(-1, keepdims=True)
    return result


def check_probabilities(
    model: Any, probabilities: bool | None, kind: str | None, outputs: Outputs
) -> None:
    """Raise a ValueError if the outputs cannot be returned as the requested kind."""
    is_as_requested = kind == (PROBABILITY if probabilities else LOGITS)
    is_removed = probabilities is False and kind == PROBABILITY
    task = recorded_task(model)
    # A sigmoid or softmax can be added, also for one output or for each pixel.
    has_activation = task is not None and kind == LOGITS
    if probabilities is None or is_as_requested or is_removed or has_activation:
        return
    if kind == NUMBERS:
        raise ValueError(
            f"Received probabilities={probabilities} for model '{model.name}', which was "
            "fine-tuned for a regression; expected None. It returns numbers."
        )
    shapes = [y.shape for y in outputs.values()]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        raise ValueError(
            f"Received probabilities={probabilities} for model '{model.name}' with outputs of "
            f"shape {', '.join(str((None, *s[1:])) for s in shapes)}; expected a classifier "
            "with one output, (batch, classes), of at least two classes. Leave it out to "
            "export the outputs as they are."
        )
    if kind is None and output_activation(model) not in (None, "linear"):
        raise ValueError(
            f"Received probabilities={probabilities} for model '{model.name}', which ends in "
            f"the activation {output_activation(model)}; expected a model that returns logits "
            "or probabilities. Leave it out to export the outputs as they are."
        )
