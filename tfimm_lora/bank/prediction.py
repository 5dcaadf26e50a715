"""``RowPrediction``: what a bank predicts for one example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend.interface import Layer
from tfimm_lora.bank.layout import Layout
from tfimm_lora.model.classifier import classifier_names
from tfimm_lora.model.output_activation import like_softmax, output_activation


class RowPrediction(NamedTuple):
    """The prediction for one example of a mixed batch.

    Attributes:
        adapter: The name of its adapter, or None for the model without adapter.
        logits: The logits in float32, one for each class of the adapter. Of a model that ends
            in a softmax or sigmoid they are computed from its probabilities. Of a model
            without a classifier they are its outputs.
        labels: The names of these classes, or None if they are not known.
        activation: "sigmoid" if the model ends in a sigmoid, otherwise "softmax".

    What a model ends in is read from its last layers. Of a model with a ``call`` of its own
    only a softmax is recognized, from its outputs.
    """

    adapter: str | None
    logits: np.ndarray
    labels: tuple[str, ...] | None
    activation: str = "softmax"

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax (or sigmoid) of the logits, in float64."""
        logits = self.logits.astype("float64")
        if self.activation == "sigmoid":
            independent: np.ndarray = 0.5 * (1 + np.tanh(0.5 * logits))
            return independent
        exponentials: np.ndarray = np.exp(logits - logits.max())
        result: np.ndarray = exponentials / exponentials.sum()
        return result

    @property
    def label(self) -> str | None:
        """The name of the most probable class; None if the names are not known."""
        return None if self.labels is None else self.labels[int(np.argmax(self.logits))]


class Predictions:
    """From the outputs of a model to predictions.

    Args:
        model: The model.
        layout: The layout of its bank.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        self._name, self._layout = model.name, layout
        self.activation = output_activation(model)
        if classifier_names(getattr(model, "cfg", None)):  # of tfimm, which returns logits
            self.activation = "linear"
        heads = [layout.layers[path] for path in layout.heads]
        self._channels_first = any(map(_has_channels_first, heads))

    def learn_activation(self, made_up_outputs: Callable[[], np.ndarray]) -> None:
        """Find out whether a model whose code cannot be read ends in a softmax.

        Args:
            made_up_outputs: Computes its outputs for a few inputs that are made up.
        """
        if self.activation is None:
            seen = made_up_outputs()
            is_softmax = seen.ndim == 2 and seen.shape[1] > 1 and like_softmax(seen)
            self.activation = "softmax" if is_softmax else "linear"

    def of(
        self,
        outputs: np.ndarray,
        adapter: str | None,
        classes: int,
        labels: tuple[str, ...] | None,
    ) -> RowPrediction:
        """The prediction for one example.

        Args:
            outputs: The outputs of the model for it.
            adapter: Its adapter.
            classes: The number of classes of the adapter; 0 without a classifier.
            labels: Their names.
        """
        logits = self._logits(self._of_classes(outputs, classes).astype("float32"))
        shown = "sigmoid" if self.activation == "sigmoid" else "softmax"
        return RowPrediction(adapter, logits, labels, shown)

    def _of_classes(self, outputs: np.ndarray, classes: int) -> np.ndarray:
        """The outputs without the classes that the adapter does not have."""
        if classes in (0, self._layout.max_classes):
            return outputs
        axis = 0 if self._channels_first and outputs.ndim > 1 else -1
        if outputs.shape[axis] != self._layout.max_classes:
            raise ValueError(
                f"Model '{self._name}' returns outputs of shape {outputs.shape} for an "
                f"example; expected an axis of the {self._layout.max_classes} classes of the "
                f"bank, from which the {classes} of the adapter are taken."
            )
        return outputs[:classes] if axis == 0 else outputs[..., :classes]

    def _logits(self, outputs: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            if self.activation == "softmax":
                logarithms: np.ndarray = np.log(outputs)
                return logarithms
            if self.activation == "sigmoid":
                odds: np.ndarray = np.log(outputs) - np.log1p(-outputs)
                return odds
        return outputs


def _has_channels_first(layer: Layer) -> bool:
    return getattr(layer, "data_format", None) == "channels_first"
