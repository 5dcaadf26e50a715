"""The runs of one method on one task, with one compiled model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np  # isort: skip
import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras
from methods import METHODS
from plan import Job
from tasks import Data, data, order_of

import tfimm_lora as lora
from tfimm_lora.backend import backend_of
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.data.augmentation import Augmentation

keras = tf.keras


#: The score of each task, of which 1 is the best.
SCORES: dict[str, Callable[[Any], float]] = {
    "classification": lambda evaluation: evaluation.accuracy,
    "multilabel": lambda evaluation: evaluation.mean_average_precision,
    "regression": lambda evaluation: evaluation.scores[0].r2,
    "segmentation": lambda evaluation: evaluation.mean_iou,
}


def task_of(parts: Data) -> Any:
    """The task of tfimm_lora for the pictures."""
    names = tuple(map(str, range(parts.classes)))
    if parts.kind == "regression":
        return lora.Regression(names, (0.0,), (float(parts.train[1].std()),))
    kinds = {"multilabel": lora.MultiLabel, "segmentation": lora.Segmentation}
    return kinds.get(parts.kind, lora.Classification)(names)


class Cosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a cosine to zero; the peak can be set."""

    def __init__(self, steps: int, warmup: float) -> None:
        super().__init__()
        self.warmup, self.steps = round(warmup * steps), steps
        self.peak = tf.Variable(0.0, trainable=False)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        step = tf.cast(step, "float32")
        rising = (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.peak * tf.minimum(rising, 0.5 * (1 + tf.cos(math.pi * done)))


class Runs:
    """Trains a job's model anew from other seeds and with other rates.

    Args:
        job: The job.
        work: The folder with the checkpoints and the downloaded pictures.
    """

    def __init__(self, job: Job, work: Path) -> None:
        self.job, self.work, self.method = job, work, METHODS[job.method]
        self.model: Any = None
        self.task: Any = None
        self.starts: dict[int, list[np.ndarray]] = {}

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Train once; the results on the validation and the test pictures."""
        started = time.process_time()
        job = self.job
        parts = data(job.task, seed, job.size, self.work / "downloads")
        if seed not in self.starts or not self._fits(self.starts[seed]):
            model = self.prepared(parts, seed)
            self.starts[seed] = model.get_weights()
            if not self._fits(self.starts[seed]):
                self._compile(model, parts)
        self.model.set_weights(self.starts[seed])
        for variable in self.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self.schedule.peak.assign(rate)
        batches = self._batches(parts.train, seed)
        callbacks = (
            [self.method.callback(self.model, self.steps)] if self.method.callback else []
        )
        keras.utils.set_random_seed(seed)
        steps = len(parts.train[0]) // job.batch * job.epochs
        # All epochs are one for Keras, which spends time on the end of each.
        history = self.model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
        result = {"rate": rate, "seed": seed, "loss": history.history["loss"][0]}
        for name, part in (("val", parts.val), ("test", parts.test)):
            result[f"{name}_accuracy"], result[f"{name}_loss"] = self._evaluate(*part)
        result["trained"] = sum(int(tf.size(v)) for v in self.model.trainable_variables)
        result["parameters"] = self.model.count_params()
        result["seconds"] = round(time.process_time() - started, 2)
        return result

    def _fits(self, start: list[np.ndarray]) -> bool:
        """Whether the compiled model can have these weights. The ranks of EVA depend on the
        pictures, and these on the seed."""
        if self.model is None:
            return False
        return [v.shape for v in start] == [tuple(v.shape) for v in self.model.weights]

    def prepared(self, parts: Any, seed: int) -> Any:
        """The model that the training of a seed starts with."""
        job = self.job
        keras.utils.set_random_seed(seed)
        base = open_base_model(
            job.model,
            classes=parts.classes,
            weights=self.work / "checkpoints" / job.model,
            input_size=(job.size, job.size),
            dense=parts.kind == "segmentation",
        )
        mean, std = (np.float32(v) for v in (base.preprocessing.mean, base.preprocessing.std))

        def preprocess(pictures: Any) -> tf.Tensor:
            return (tf.cast(pictures, "float32") / 255 - mean) / std

        before = base.model(preprocess(parts.test[0][:8]), training=False)
        self.method.prepare(base.model, parts.train, preprocess)
        after = base.model(preprocess(parts.test[0][:8]), training=False)
        difference = float(tf.reduce_max(tf.abs(before - after)))
        assert difference < 1e-3, f"starts {difference:g} away from the pretrained model"
        self.preprocess = preprocess  # the same for all seeds
        return base.model

    def _compile(self, model: Any, parts: Any) -> None:
        job = self.job
        self.steps = len(parts.train[0]) // job.batch * job.epochs
        self.schedule = Cosine(self.steps, job.warmup)
        optimizer = keras.optimizers.AdamW(
            self.schedule, weight_decay=job.weight_decay, global_clipnorm=job.clip_norm or None
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        self.task = task_of(parts)
        self.losses = self.task.losses(backend_of(model), None)
        model.compile(
            self.method.optimizer(model, optimizer), self.losses, steps_per_execution=5
        )
        self.model, self.optimizer = model, model.optimizer
        self.optimizer.build(model.trainable_variables)
        self.forward = tf.function(lambda x: model(self.preprocess(x), training=False))

    def _batches(self, part: tuple[np.ndarray, np.ndarray], seed: int) -> tf.data.Dataset:
        """Batches of pictures in an order that depends only on the seed."""
        job, (x, y) = self.job, part
        order = order_of(len(x), job, seed)
        pictures, labels = tf.constant(x), tf.constant(y)
        augmentation = Augmentation.named(job.augmentation)
        augment = None
        if augmentation != Augmentation.none():
            augment = augmentation.function((job.size, job.size))

        def example(index: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            picture = pictures[index]
            if augment is not None:
                picture = augment(picture, tf.stack([tf.constant(seed, tf.int64), number]))
            return self.preprocess(picture), labels[index]

        numbers = np.arange(order.size, dtype="int64")
        indices = tf.data.Dataset.from_tensor_slices((order, numbers))
        return indices.map(example).batch(job.batch, drop_remainder=True).prefetch(2)

    def _evaluate(self, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        """The score of the task (such as the accuracy), and the loss."""
        logits = self.outputs(x)
        evaluation = self.task.evaluate(logits.astype("float64"), y)
        return SCORES[self.task.name](evaluation), float(np.mean(self.losses(y, logits)))

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """The outputs of the trained model for pictures."""
        # Whole batches of one shape are traced once.
        padded = np.concatenate([x, x[: -len(x) % 100]])
        batches = (padded[i : i + 100] for i in range(0, len(padded), 100))
        found = np.concatenate([self.forward(tf.constant(batch)) for batch in batches])
        return found[: len(x)]
