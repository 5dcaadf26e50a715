"""``RowPrediction``: what a bank predicts for one example."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RowPrediction(NamedTuple):
    """The prediction for one example of a mixed batch.

    Attributes:
        adapter: The name of its adapter, or None for the model without adapter.
        logits: The logits, one for each class of the adapter. Of a model that ends in a
            softmax they are the logarithms of its probabilities.
        labels: The names of these classes, or None if they are not known.
    """

    adapter: str | None
    logits: np.ndarray
    labels: tuple[str, ...] | None

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits, in float64."""
        shifted = self.logits.astype("float64")
        exponentials: np.ndarray = np.exp(shifted - shifted.max())
        result: np.ndarray = exponentials / exponentials.sum()
        return result

    @property
    def label(self) -> str | None:
        """The name of the most probable class; None if the names are not known."""
        return None if self.labels is None else self.labels[int(np.argmax(self.logits))]
