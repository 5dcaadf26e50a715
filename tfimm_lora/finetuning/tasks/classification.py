"""Classification: each picture belongs to one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.class_targets import CLASSES
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.metrics import Evaluation, log_softmax
from tfimm_lora.finetuning.tasks.base import Losses, Task
from tfimm_lora.finetuning.tasks.classification_views import ClassificationViews


@dataclass(frozen=True)
class Classification(Task):
    """Each picture belongs to one class. The loss is the softmax cross-entropy."""

    name: ClassVar[str] = "classification"
    activation: ClassVar[str | None] = "softmax"
    monitored: ClassVar[tuple[str, ...]] = ("val_loss", "val_accuracy", "loss", "accuracy")
    loss_name: ClassVar[str] = "softmax cross-entropy"
    weighs_examples: ClassVar[bool] = True
    trains_classifier: ClassVar[bool] = False

    @classmethod
    def targets(cls, columns: Sequence[str] | None = None) -> Targets:
        if columns is not None:
            raise ValueError(
                f"Received columns={list(columns)} with the task {cls.name!r}; expected None. "
                "The class is in the column label."
            )
        return CLASSES

    def known_targets(self) -> Targets:
        return CLASSES

    def balanced_weights(self, train: PictureSet) -> dict[int, float]:
        return class_weights(train)

    def losses(self, backend: Backend, class_weight: Mapping[int, float] | None) -> Losses:
        entropy = backend.keras.losses.sparse_categorical_crossentropy
        return lambda labels, logits: entropy(labels, logits, from_logits=True)

    def metrics(self, backend: Backend) -> list[Any]:
        return ["accuracy"]

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, paths: Sequence[str] | None = None
    ) -> Evaluation:
        return Evaluation.of(outputs, labels, self.labels or None, paths)

    def values(self, outputs: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = np.exp(log_softmax(outputs))
        return probabilities

    @property
    def views(self) -> ClassificationViews:
        return ClassificationViews(self.labels)


def class_weights(pictures: PictureSet) -> dict[int, float]:
    """Class weights that balance the classes: n / (classes * n of the class).

    Example:
        >>> from tfimm_lora.finetuning.data.dataset import Picture, PictureSet
        >>> from tfimm_lora.finetuning.tasks.classification import class_weights
        >>> labels = [0, 0, 0, 1]
        >>> found = tuple(Picture(str(i), label) for i, label in enumerate(labels))
        >>> {k: round(v, 3) for k, v in class_weights(PictureSet(found, ("a", "b"))).items()}
        {0: 0.667, 1: 2.0}
    """
    counts = list(pictures.counts().values())
    return {i: len(pictures) / (len(counts) * n) for i, n in enumerate(counts) if n}
