"""``finetune``: train a LoRA model on batches of pictures, with checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tfimm_lora.adapters.save import adapter_to_save
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.checkpoint import (
    Progress,
    TrainingCheckpoints,
    restore_values,
    values_of,
)
from tfimm_lora.finetuning.distributed.current import devices_of
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.metrics_csv import write_metrics
from tfimm_lora.finetuning.monitor import is_minimized
from tfimm_lora.finetuning.optimizer import CLIP_NORM, LEARNING_RATE, create_optimizer
from tfimm_lora.finetuning.progress import Reporter
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.finetuning.tasks.of_model import record_trained_task, task_to_train
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.validation import check_batches, check_integer

#: The epochs of a training; see docs/explanation/study.md.
EPOCHS = 20

#: The folders and the file in the output folder of ``finetune``.
STATE, ADAPTER, METRICS = "state", "adapter", "metrics.csv"

#: What trainings of earlier versions did, which their checkpoints do not tell.
_ADDED = {"accumulate": 1, "task": Classification.name}


@runtime_checkable
class Epochs(Protocol):
    """Batches whose order depends only on the index of the epoch."""

    steps_per_epoch: int

    def epochs(self, first: int) -> Any:
        """The batches from epoch ``first`` on, as an infinite dataset."""


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        history: The metrics of each epoch, as Keras reports them: loss, accuracy, val_loss, ...
        best_epoch: The best epoch, from 1, whose weights the model has.
        stopped_early: Whether the training was stopped by ``patience``.
    """

    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool


def finetune(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip_norm: float = CLIP_NORM,
    optimizer: Any = None,
    loss: Any = None,
    metrics: Sequence[Any] | None = None,
    task: Task | None = None,
    class_weight: Mapping[int, float] | None = None,
    accumulate: int = 1,
    monitor: str = "val_loss",
    patience: int | None = None,
    callbacks: Sequence[Any] = (),
    steps_per_epoch: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    verbose: str = "lines",
) -> Trained:
    """Train a LoRA model and restore the weights of the best epoch.

    The model is compiled and trained with its ``fit``. The function adds the usual choices
    (AdamW with warm-up and cosine decay, early stopping, the best weights) and checkpoints from
    which an interrupted training can be resumed.

    A file of the trained model (``model.save``) contains its layers and weights, but not this
    loss and optimizer. To train it further with Keras, compile it.

    A model that was created in the scope of a ``tf.distribute.Strategy``, or under a
    ``keras.distribution``, is trained on the devices of it; see docs/how-to/several-devices.md.

    Args:
        model: A LoRA model that returns logits (n, classes). Its LoRA config determines which
            weights are trained.
        train: Batches (pictures, labels) as a ``tf.data.Dataset`` of known length, with class
            indices as labels, or those of the task, (n, outputs); or an object with
            ``epochs(first)`` and ``steps_per_epoch``, such as ``PictureBatches``, whose order
            depends only on the index of the epoch. Only then is a resumed training bitwise
            identical to one without interruption: a dataset that shuffles restarts with its
            first order.
        validation: A dataset for validation after each epoch, or ``PictureBatches``, which are
            read in order. Default: none. The weights of the last epoch are then kept.
        epochs: The number of epochs. Default: 20.
        learning_rate, weight_decay, warmup: As for ``create_optimizer``. Default: 3e-3, 0.01
            and a tenth of the steps.
        clip_norm: The largest norm of the gradient, over all trained weights together.
            Default: 1. 0 means no clipping.
        optimizer: An optimizer to use instead of this AdamW.
        loss: The loss. Default: that of the task, computed in float32.
        metrics: The metrics. Default: those of the task.
        task: What the model is fine-tuned for: ``Classification`` (default: the cross-entropy
            of class indices, and accuracy), ``MultiLabel`` or ``Regression``. Adapters of the
            model record the task and its labels, but no thresholds or intervals, which belong
            to other weights.
        class_weight: The weight of each class in the loss, or of the pictures that have a label
            in the loss of the label. Default: 1 for all.
        accumulate: The number of parts of a batch that are computed one after the other. The
            weights are updated with the mean gradient of all parts, so less memory is needed
            for the same result (but batch normalization that is trained uses the statistics of
            each part, and dropout draws other numbers). Default: 1.
        monitor: The metric that determines the best epoch, by its name in the logs of Keras. A
            loss or an error ("val_mae", "val_mse") is minimized, everything else is maximized.
            Default: "val_loss".
        patience: The number of epochs without improvement after which the training stops.
            Default: never.
        callbacks: Additional Keras callbacks. Their state is not restored by ``resume``.
        steps_per_epoch: The number of batches in an epoch, for a dataset of unknown length.
        out: A folder for a checkpoint after each epoch (``state``), the adapter of the best
            epoch so far (``adapter``) and the metrics (``metrics.csv``). Default: nothing is
            written.
        resume: Whether to resume from the checkpoint in ``out``, if there is one. ``epochs``
            may then be another number, at least that of the epochs done; the rate continues on
            its schedule.
        seed: The seed of the random operations of training (dropout). On Keras 3 layers have
            seeds of their own. They draw new numbers in each epoch, and the same numbers in a
            resumed training. Layers of your own that call ``tf.random.uniform`` and its like
            draw the same numbers in each epoch, and each epoch starts seconds later.
        verbose: "bar" and "lines" (default) print to stderr, "none" prints nothing.

    Returns:
        The history and the best epoch. The model has the weights of the best epoch.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: if the model has no LoRA layers or is merged, a value is out of range, there
            is a checkpoint in ``out`` and ``resume`` is False, or the checkpoint does not fit.
            Also if the model was fine-tuned for several labels or a regression and ``task`` is
            not given, or if it ends in a softmax or sigmoid and is to be.
        FloatingPointError: if the loss is NaN or infinite.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
        >>> x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 2])
        >>> train = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        >>> trained = lora.finetune(model, train, epochs=2, verbose="none")
        >>> len(trained.history), trained.best_epoch
        (2, 2)
    """
    check_integer(epochs, "epochs", 1)
    if patience is not None:
        check_integer(patience, "patience", 1)
    require_unmerged(model)
    check_integer(accumulate, "accumulate", 1)
    _check_accumulate(model, accumulate)
    is_given, task = task is not None, task_to_train(model, task, loss)
    backend, devices = backend_of(model), devices_of(model)
    devices.check(backend)
    steps = count_steps(train, steps_per_epoch)
    recorder = _EpochRecorder(
        model,
        devices,
        Path(out) if out is not None else None,
        monitor=monitor if validation is not None or monitor != "val_loss" else None,
        patience=patience,
        fingerprint={
            "epochs": epochs,
            "steps_per_epoch": steps,
            "seed": seed,
            "accumulate": accumulate,
            "task": task.name,
        },
    )
    recorder.read(resume)
    reporter = Reporter(verbose if devices.is_chief else "none", epochs, steps * accumulate)
    is_infinite = isinstance(train, Epochs)
    # Workers have different dropout masks.
    random_ops = backend.restartable_random_ops(model, seed + devices.worker)
    with devices.scope(), devices.together(), random_ops as restart:
        done = recorder.progress.epoch
        devices.agree(
            f"checkpoint in out={out!r}, here after epoch {done}", vars(recorder.progress)
        )
        if optimizer is None:
            optimizer = create_optimizer(
                backend.keras,
                steps=epochs * steps,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                warmup=warmup,
                clip_norm=clip_norm,
            )
        if accumulate > 1:
            optimizer = backend.keras.optimizers.get(optimizer)
            backend.accumulate_gradients(optimizer, accumulate)
        # weighted_metrics is empty: the example weights that devices add are for the loss only.
        model.compile(
            optimizer=optimizer,
            loss=default_loss(backend, devices, task, class_weight) if loss is None else loss,
            metrics=task.metrics(backend) if metrics is None else list(metrics),
            weighted_metrics=[],
        )
        if loss is None or accumulate > 1:
            backend.forget_compile_arguments(model)
        model.optimizer.build(model.trainable_variables)
        first = recorder.restore()
        if is_given:
            record_trained_task(model, task)
        if first < epochs and not recorder.stopped:
            batches, weights = devices.training(
                train,
                first,
                dict(class_weight) if class_weight and task.weighs_examples else None,
                accumulate,
            )
            example = example_batch(batches)
            if example is not None and type(devices) is Devices:
                backend.create_metrics(model, example)
            devices.fit(
                model,
                batches,
                epochs=epochs,
                initial_epoch=first,
                steps_per_epoch=steps * accumulate if is_infinite or steps_per_epoch else None,
                validation_data=devices.validation(validation),
                class_weight=weights,
                callbacks=[
                    *callbacks,
                    *devices.callbacks(backend),
                    *reporter.callbacks(backend),
                    backend.keras.callbacks.LambdaCallback(
                        on_epoch_begin=lambda epoch, logs: restart(epoch)
                    ),
                    recorder.callback(),
                ],
                shuffle=False,  # a dataset has its own order; Keras 3 warns without this
                verbose=0,
            )
        return recorder.finish()


def require_unmerged(model: Any) -> None:
    """Raise unless no LoRA layer of the model is merged, and there are some."""
    layers = lora_layers(model)
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"Received model '{model.name}' with {len(merged)} merged layers: "
            f"{', '.join(merged[:5])}; expected none. Call unmerge_lora_weights before "
            "training."
        )


def _check_accumulate(model: Any, accumulate: int) -> None:
    policy = getattr(getattr(model, "dtype_policy", None), "name", None)
    if accumulate > 1 and policy == "mixed_float16":
        raise ValueError(
            f"Received accumulate={accumulate} for a model in mixed_float16, whose loss "
            "scaling leaves out single steps; expected mixed_bfloat16 or float32."
        )


def count_steps(train: Any, steps_per_epoch: int | None) -> int:
    """The number of batches in an epoch."""
    check_batches(train, "train")
    if steps_per_epoch is not None:
        check_integer(steps_per_epoch, "steps_per_epoch", 1)
        return steps_per_epoch
    if isinstance(train, Epochs):
        return train.steps_per_epoch
    try:
        steps = len(train)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(
            f"Received train={train!r}, whose number of batches is unknown or zero; expected a "
            "dataset of known length. Pass steps_per_epoch for others."
        )
    return steps


def example_batch(batches: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Zeros of the shapes and types of a batch of two; None if they are not known."""
    spec = getattr(batches, "element_spec", None)
    if not isinstance(spec, tuple) or len(spec) < 2:
        return None
    zeros = []
    for part in spec[:2]:
        shape, dtype = getattr(part, "shape", None), getattr(part, "dtype", None)
        if shape is None or getattr(shape, "rank", 1) is None or None in tuple(shape)[1:]:
            return None
        zeros.append(np.zeros((2, *tuple(shape)[1:]), getattr(dtype, "as_numpy_dtype", dtype)))
    return zeros[0], zeros[1]


def default_loss(
    backend: Backend,
    devices: Devices,
    task: Task,
    class_weight: Mapping[int, float] | None = None,
) -> Any:
    """The loss of a task on some devices."""
    losses = task.losses(backend, class_weight)

    def loss(labels: Any, outputs: Any) -> Any:
        # Under mixed precision the outputs are 16-bit, too imprecise for a softmax.
        outputs = backend.ops.cast(outputs, "float32")
        return devices.scaled_losses(losses(labels, outputs))

    return loss


class _EpochRecorder:
    """Records metrics, best weights and checkpoints after each epoch."""

    def __init__(
        self,
        model: Any,
        devices: Devices,
        out: Path | None,
        *,
        monitor: str | None,
        patience: int | None,
        fingerprint: dict[str, Any],
    ) -> None:
        self.model, self.out, self.monitor, self.patience = model, out, monitor, patience
        self.backend, self.writes = backend_of(model), devices.is_chief
        self.progress = Progress(fingerprint=fingerprint)
        self.checkpoints = TrainingCheckpoints(out / STATE) if out is not None else None
        self.best_values: dict[str, np.ndarray] | None = None

    # -- before training ---------------------------------------------------------------

    def read(self, resume: bool) -> None:
        """Read the progress of the last checkpoint, if there is one.

        Raises:
            ValueError: if there is one and ``resume`` is False, or it has other settings.
        """
        last = self.checkpoints.last() if self.checkpoints is not None else None
        if last is None:
            return
        if not resume:
            raise ValueError(
                f"There is a checkpoint in {self.out}, after epoch {last.epoch}; expected "
                "another folder. Pass resume=True to resume the training."
            )
        expected = self.progress.fingerprint
        # More epochs than planned continue on a longer schedule.
        found = {**_ADDED, **last.fingerprint}
        changed = [k for k in expected if found.get(k) != expected[k]]
        if "epochs" in changed and expected["epochs"] >= last.epoch:
            changed.remove("epochs")
        if changed:
            listed = [f"{k}={found.get(k)}, now {expected[k]}" for k in changed]
            raise ValueError(
                f"The training in {self.out} was started with other settings: "
                f"{'; '.join(listed)}. Resume it with the same settings, or start a new one in "
                "another folder."
            )
        last.fingerprint = expected
        self.progress = last

    def restore(self) -> int:
        """Restore the model and optimizer; return the index of the next epoch."""
        done = self.progress.epoch
        if done and self.checkpoints is not None:
            restore_values(self.model, self.model.optimizer, self.checkpoints.values(done - 1))
            best = self.progress.best
            if best is not None:
                self.best_values = self.checkpoints.values(best)
            self._write_metrics()
        return done

    # -- during training ---------------------------------------------------------------

    def callback(self) -> Any:
        """The Keras callback. It must be the last one, to see the decisions of the others."""
        return self.backend.keras.callbacks.LambdaCallback(on_epoch_end=self._end)

    def _end(self, epoch: int, logs: Any = None) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items()}
        if not np.isfinite(numbers.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss is {numbers['loss']} in epoch {epoch + 1}: the training has "
                "diverged. Use a lower learning_rate or a longer warmup. The checkpoint of the "
                "previous epoch is kept."
            )
        progress = self.progress
        progress.epoch = epoch + 1
        progress.history.append(numbers)
        values = values_of(self.model, self.model.optimizer)
        if self._is_best(numbers):
            progress.best = epoch
            self.best_values = values
            self._save_adapter()
        if self.checkpoints is not None and self.writes:
            self.checkpoints.save(progress, values)
        self._write_metrics()
        if self.stopped:
            self.model.stop_training = True

    def _is_best(self, numbers: dict[str, float]) -> bool:
        best = self.progress.best
        if self.monitor is None:
            return True
        if self.monitor not in numbers:
            raise ValueError(
                f"Received monitor={self.monitor!r}; expected one of the metrics: "
                f"{', '.join(numbers)}."
            )
        if best is None:
            return True
        now, before = numbers[self.monitor], self.progress.history[best][self.monitor]
        return now < before if is_minimized(self.monitor) else now > before

    @property
    def stopped(self) -> bool:
        """Whether ``patience`` stops the training."""
        best = self.progress.best
        if self.patience is None or best is None:
            return False
        return self.progress.epoch - 1 - best >= self.patience

    # -- after training ----------------------------------------------------------------

    def finish(self) -> Trained:
        """Restore the best weights and return the result."""
        best = self.progress.best
        assert best is not None and self.best_values is not None
        restore_values(self.model, None, self.best_values)
        self._save_adapter()
        return Trained(self.progress.history, best + 1, self.stopped)

    def _save_adapter(self) -> None:
        if self.out is not None:
            # All workers call this: some values are averaged over them.
            adapter = adapter_to_save(self.model)
            if self.writes:
                adapter.save(self.out / ADAPTER)

    def _write_metrics(self) -> None:
        if self.out is not None and self.writes:
            write_metrics(self.out / METRICS, self.progress.history)
