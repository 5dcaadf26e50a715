"""Segmentation: each pixel belongs to one class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.mask_classes import IGNORED, MaskClasses
from tfimm_lora.finetuning.data.mask_targets import MaskTargets
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.metrics import log_softmax
from tfimm_lora.finetuning.segmentation_metrics import (
    SegmentationCollector,
    SegmentationEvaluation,
)
from tfimm_lora.finetuning.tasks.base import Losses, Task
from tfimm_lora.finetuning.tasks.segmentation_views import SegmentationViews
from tfimm_lora.model.task_record import TaskRecord


@dataclass(frozen=True)
class Segmentation(Task):
    """Each pixel of a picture belongs to one class (semantic segmentation).

    With logits z of the classes of a pixel and its class y, the loss of a picture is the mean
    over its pixels, without those that are ignored, of

        w[y] (log(sum(exp(z))) - z[y]),

    the softmax cross-entropy. The weights are ``class_weight`` of ``finetune``. A picture of
    which all pixels are ignored has the loss 0.

    Args:
        labels: The names of the classes, in the order of the outputs.
        classes: Which pixels of a mask belong to which class, as ``Segmentation.of`` takes it
            from training pictures. Default: the mask has the index of the class, and 255 is
            ignored.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> task = lora.Segmentation(("ground", "car"))
        >>> logits = np.array([[[[2.0, 0.0], [0.0, 2.0]]]])  # of two pixels
        >>> task.values(logits).round(2).tolist()
        [[[[0.88, 0.12], [0.12, 0.88]]]]
    """

    classes: MaskClasses | None = None

    name: ClassVar[str] = "segmentation"
    activation: ClassVar[str | None] = "softmax"
    monitored: ClassVar[tuple[str, ...]] = ("val_loss", "val_mean_iou", "loss", "mean_iou")
    loss_name: ClassVar[str] = "softmax cross-entropy of each pixel"
    is_dense: ClassVar[bool] = True

    @classmethod
    def targets(
        cls,
        columns: Sequence[str] | None = None,
        *,
        masks: str | None = None,
        classes: str | None = None,
    ) -> Targets:
        if columns is not None:
            raise ValueError(
                f"Received columns={list(columns)} with the task {cls.name!r}; expected None. "
                "The file of a mask is in the column mask."
            )
        return MaskTargets(masks, classes)

    def known_targets(self) -> Targets:
        return MaskTargets(classes=self.mask_classes)

    @property
    def mask_classes(self) -> MaskClasses:
        """Which pixels of a mask belong to which class."""
        if self.classes is not None:
            return self.classes
        return MaskClasses(self.labels, tuple(range(len(self.labels))))

    @classmethod
    def of(cls, train: PictureSet) -> Segmentation:
        """The task for training pictures, with the classes of their masks."""
        targets = train.targets
        if not isinstance(targets, MaskTargets):
            raise ValueError(
                f"Received pictures with {type(targets).__name__}; expected pictures with "
                "masks: find_pictures(..., targets=Segmentation.targets())."
            )
        return cls(train.labels, targets.classes_of(train.labels))

    def balanced_weights(self, train: PictureSet) -> dict[int, float]:
        """n / (classes * n of the class), for n pixels, of the classes that occur."""
        assert isinstance(train.targets, MaskTargets)
        counts = list(train.targets.pixels(train).values())
        there = sum(number > 0 for number in counts)
        return {i: sum(counts) / (there * n) for i, n in enumerate(counts) if n}

    def preprocessing(self, preprocessing: Preprocessing) -> Preprocessing:
        """That of the model, but so that whole pictures are resized to its input."""
        return dataclasses.replace(preprocessing, crop_pct=1.0, crop_mode="squash")

    def check_model(self, model: Any) -> None:
        """Raise unless the model returns a score of each class for each pixel."""
        shape = getattr(model, "output_shape", None)  # not of a subclassed model
        if shape is not None and len(shape) != 4:
            raise ValueError(
                f"Received model '{model.name}' with outputs of shape {shape}; expected "
                "(batch, height, width, classes). Open it with open_base_model(..., "
                "dense=True)."
            )

    def losses(self, backend: Backend, class_weight: Mapping[int, float] | None) -> Losses:
        ops = backend.ops
        entropy = backend.keras.losses.sparse_categorical_crossentropy
        weights = None
        if class_weight:
            listed = [class_weight.get(i, 1.0) for i in range(len(self.labels))]
            weights = np.array(listed, np.float32)

        def losses(labels: Any, logits: Any) -> Any:
            _check_shapes(labels, logits, len(self.labels) or None)
            labels = ops.cast(labels, "int32")
            ignored = ops.equal(labels, IGNORED)
            known = 1 - ops.cast(ignored, "float32")
            labels = ops.where(ignored, ops.zeros_like(labels), labels)
            terms = entropy(labels, logits, from_logits=True) * known
            if weights is not None:
                terms = terms * ops.take(ops.cast(weights, "float32"), labels, axis=0)
            pixels = ops.sum(known, axis=(1, 2))
            none = ops.cast(ops.equal(pixels, 0), "float32")
            return ops.sum(terms, axis=(1, 2)) / (pixels + none)

        return losses

    def metrics(self, backend: Backend) -> list[Any]:
        """The mean IoU over the classes that are there or predicted."""
        mean_iou = backend.keras.metrics.MeanIoU
        return [
            mean_iou(len(self.labels), "mean_iou", ignore_class=IGNORED, sparse_y_pred=False)
        ]

    def collector(self) -> SegmentationCollector:
        return SegmentationCollector(self.labels)

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, paths: Sequence[str] | None = None
    ) -> SegmentationEvaluation:
        collector = self.collector()
        collector.add(outputs, labels)
        return collector.evaluation(paths)

    def values(self, outputs: np.ndarray) -> np.ndarray:
        probabilities: np.ndarray = np.exp(log_softmax(outputs))
        return probabilities

    def record(self) -> TaskRecord:
        masks = None if self.classes is None else self.classes.to_dict()
        return dataclasses.replace(super().record(), masks=masks)

    @classmethod
    def of_record(cls, record: TaskRecord) -> Segmentation:
        if record.masks is None:
            return cls(record.labels)
        return cls(record.labels, MaskClasses.from_dict(record.labels, record.masks))

    @property
    def views(self) -> SegmentationViews:
        return SegmentationViews(self.mask_classes)


def _check_shapes(labels: Any, logits: Any, count: int | None) -> None:
    """Raise unless there is a class for each pixel and a logit for each class."""
    given, shape = tuple(labels.shape), tuple(logits.shape)
    fits = len(given) == 3 and len(shape) == 4
    fits = fits and all(a == b for a, b in zip(given, shape) if None not in (a, b))
    if not fits or count not in (None, shape[-1]):
        of_task = "" if count is None else f" and a task of {count} classes"
        raise ValueError(
            f"Received masks of shape {given}{of_task} for a model with outputs of shape "
            f"{shape}; expected masks (n, height, width) and outputs (n, height, width, "
            "classes)."
        )
