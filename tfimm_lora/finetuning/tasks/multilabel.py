"""Several labels: each picture has any number of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.label_targets import LabelTargets
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.multilabel_metrics import (
    MultiLabelEvaluation,
    best_threshold,
    sigmoid,
)
from tfimm_lora.finetuning.tasks.base import Losses, Task, check_sizes
from tfimm_lora.finetuning.tasks.multilabel_views import MultiLabelViews
from tfimm_lora.model.task_record import TaskRecord

#: The name of the thresholds in records.
_THRESHOLDS = "thresholds"


@dataclass(frozen=True)
class MultiLabel(Task):
    """Each picture has any number of labels, and each output is the logit of a label.

    With logits z, labels y of 0 and 1, and weights w, the loss of a picture is the mean over
    the labels of

        w y log(1 + exp(-z)) + (1 - y) log(1 + exp(z)),

    the binary cross-entropy of sigmoid(z). The weights are ``class_weight`` of ``finetune``.

    Args:
        labels: The names of the labels, in the order of the outputs.
        thresholds: The probability from which each label is chosen. ``with_validation`` chooses
            the thresholds with the largest F1. Default: 0.5 for all.

    Example:
        >>> import tfimm_lora as lora
        >>> task = lora.MultiLabel(("cat", "dog"), thresholds=(0.3, 0.5))
        >>> task.record().to_dict()["chosen"]
        {'thresholds': [0.3, 0.5]}
    """

    thresholds: tuple[float, ...] | None = None

    name: ClassVar[str] = "multilabel"
    activation: ClassVar[str | None] = "sigmoid"
    monitored: ClassVar[tuple[str, ...]] = ("val_loss", "val_pr_auc", "loss", "pr_auc")
    loss_name: ClassVar[str] = "binary cross-entropy of each label"
    uses_validation: ClassVar[bool] = True

    @classmethod
    def targets(cls, columns: Sequence[str] | None = None) -> Targets:
        return LabelTargets(None if columns is None else tuple(columns))

    def known_targets(self) -> Targets:
        return LabelTargets(self.labels, known=True)

    def balanced_weights(self, train: PictureSet) -> dict[int, float]:
        """The number of pictures without a label divided by that of pictures with it."""
        counts = train.counts().values()
        return {i: (len(train) - n) / n for i, n in enumerate(counts) if n}

    def losses(self, backend: Backend, class_weight: Mapping[int, float] | None) -> Losses:
        ops, softplus = backend.ops, backend.keras.activations.softplus
        weights = None
        if class_weight:
            listed = [class_weight.get(i, 1.0) for i in range(len(self.labels))]
            weights = np.array(listed, np.float32)

        def losses(labels: Any, logits: Any) -> Any:
            check_sizes(labels, logits, len(self.labels) or None)
            labels = ops.cast(labels, "float32")
            positive = labels * softplus(-logits)
            if weights is not None:
                positive = positive * ops.cast(weights, "float32")
            terms = positive + (1 - labels) * softplus(logits)
            return ops.sum(terms, axis=-1) / logits.shape[-1]

        return losses

    def metrics(self, backend: Backend) -> list[Any]:
        """The area under the curve of precision and recall, the mean of the labels."""
        auc = backend.keras.metrics.AUC
        count = len(self.labels) or None
        options = {"multi_label": True, "num_labels": count, "from_logits": True}
        return [auc(curve="PR", name="pr_auc", **options)]

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, paths: Sequence[str] | None = None
    ) -> MultiLabelEvaluation:
        names = self.labels or None
        return MultiLabelEvaluation.of(outputs, labels, names, paths, self.thresholds)

    def with_validation(self, outputs: np.ndarray, labels: np.ndarray) -> MultiLabel:
        """The task with the thresholds that maximize the F1 of each label."""
        columns = zip(labels.astype(bool).T, sigmoid(outputs).T)
        thresholds = tuple(best_threshold(true, p) for true, p in columns)
        return dataclasses.replace(self, thresholds=thresholds)

    def values(self, outputs: np.ndarray) -> np.ndarray:
        return sigmoid(outputs)

    def explained(self, values: np.ndarray, threshold: float | None = None) -> tuple[int, ...]:
        """The chosen labels, the most probable first; without any, the most probable."""
        limits = np.array(self.thresholds or (0.5,) * len(values))
        if threshold is not None:
            limits[:] = threshold
        ranked = np.argsort(-values, kind="stable")
        return tuple(int(i) for i in ranked if values[i] >= limits[i]) or (int(ranked[0]),)

    def record(self) -> TaskRecord:
        chosen = {} if self.thresholds is None else {_THRESHOLDS: self.thresholds}
        return dataclasses.replace(super().record(), chosen=chosen)

    @classmethod
    def of_record(cls, record: TaskRecord) -> MultiLabel:
        found = record.chosen.get(_THRESHOLDS)
        return cls(record.labels, None if found is None else tuple(map(float, found)))

    @property
    def views(self) -> MultiLabelViews:
        return MultiLabelViews(self.labels, self.thresholds)
