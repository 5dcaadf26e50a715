"""``finetune``: train a LoRA model on batches of pictures, in a way that can be resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tfimm_lora.adapters.save import adapter_of
from tfimm_lora.backend import backend_of
from tfimm_lora.finetuning.checkpoint import Checkpoints, Progress, give_values, values_of
from tfimm_lora.finetuning.distributed.devices import Devices, devices_of
from tfimm_lora.finetuning.metrics_csv import write_metrics
from tfimm_lora.finetuning.optimizer import check_whole, create_optimizer
from tfimm_lora.finetuning.progress import Reporter
from tfimm_lora.model.merge import lora_layers

#: Folders in the one that ``finetune`` is given.
STATE, ADAPTER, METRICS = "state", "adapter", "metrics.csv"


@runtime_checkable
class Epochs(Protocol):
    """Batches whose order depends on the number of the epoch alone."""

    steps_per_epoch: int

    def epochs(self, first: int) -> Any:
        """The batches of epoch ``first`` and of all after it, as one endless dataset."""


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        history: For each epoch the numbers that Keras gives: loss, accuracy, val_loss, ...
        best_epoch: The epoch, from 1, whose weights the model has now.
        stopped_early: Whether ``patience`` ended it.
    """

    history: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool


def finetune(
    model: Any,
    train: Any,
    validation: Any = None,
    *,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    optimizer: Any = None,
    loss: Any = None,
    metrics: Sequence[Any] = ("accuracy",),
    class_weight: Mapping[int, float] | None = None,
    monitor: str = "val_loss",
    patience: int | None = None,
    callbacks: Sequence[Any] = (),
    steps_per_epoch: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    verbose: str = "lines",
) -> Trained:
    """Train a LoRA model as one usually does, and leave it with the weights that were best.

    The model is compiled and its ``fit`` is called; nothing is done here that you could not
    do yourself with these two. What is added are the usual choices (AdamW with warm-up and
    a cosine, early stopping, the best weights) and that a training can go on where it was
    interrupted.

    A model that was created in the scope of a ``tf.distribute.Strategy``, or under a
    ``keras.distribution``, is trained on its devices: see docs/scaling.md.

    Args:
        model: A model with LoRA that gives logits (n, classes). What is trained is what its
            LoRA config says.
        train: Batches (pictures, labels) as a ``tf.data.Dataset`` of known length, with whole
            numbers as labels; or an object with ``epochs(first)`` and ``steps_per_epoch``,
            such as ``PictureBatches``, whose order depends on the epoch's number alone: only
            then is a resumed training the same to the last bit. A dataset that shuffles
            itself begins anew with its first order.
        validation: A dataset to validate on after each epoch. Default none: then the weights
            after the last epoch are kept.
        epochs: Number of epochs. Default 10.
        learning_rate, weight_decay, warmup: Of ``create_optimizer``. Default 1e-3, 0.01 and a
            tenth of the steps.
        optimizer: An optimizer instead of that one.
        loss: Default: cross-entropy of the logits, computed in float32.
        metrics: Default: accuracy.
        class_weight: Class -> its weight in the loss. Default: all the same.
        monitor: What tells the best epoch: a name of Keras' logs. Of a loss the least is
            best, of anything else the greatest. Default "val_loss".
        patience: How many epochs without a better one end the training. Default: never.
        callbacks: Keras callbacks besides. Their own state is not kept for ``resume``.
        steps_per_epoch: Where a dataset has no known length.
        out: A folder for the state after each epoch (``state``), the adapter of the best
            epoch so far (``adapter``) and the numbers (``metrics.csv``). Default: none of
            them.
        resume: Whether to go on from the state in ``out``, if there is one.
        seed: Of the random operations of training (dropout). Those of TensorFlow that keep
            no state begin with each epoch anew, so that a resumed training has the same.
        verbose: "bar" and "lines" (default) print to stderr, "none" does not.

    Returns:
        The history and the best epoch. The model has the weights of the best epoch.

    Raises:
        ValueError: if the model has no LoRA or is merged, a value is out of its range, there
            is a state in ``out`` and ``resume`` is False, or the state does not fit.
        FloatingPointError: if the loss is no longer finite.

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
    check_whole("epochs", epochs, 1)
    if patience is not None:
        check_whole("patience", patience, 1)
    _require_trainable(model)
    backend, devices = backend_of(model), devices_of(model)
    devices.check(backend)
    steps = _steps(train, steps_per_epoch)
    keeper = _Keeper(
        model,
        devices,
        Path(out) if out is not None else None,
        monitor=monitor if validation is not None or monitor != "val_loss" else None,
        patience=patience,
        seed=seed,
        fingerprint={"epochs": epochs, "steps_per_epoch": steps, "seed": seed},
    )
    keeper.look(resume)
    reporter = Reporter(verbose if devices.is_chief else "none", epochs, steps)
    endless = isinstance(train, Epochs)
    with devices.scope(), devices.together():
        done = keeper.progress.epoch
        devices.agree(f"state in out={out!r}, here after epoch {done}", vars(keeper.progress))
        if optimizer is None:
            optimizer = create_optimizer(
                backend.keras,
                steps=epochs * steps,
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                warmup=warmup,
            )
        with_loss = loss if loss is not None else _cross_entropy(backend, devices)
        # Weights that devices give to pictures are for the loss only.
        model.compile(
            optimizer=optimizer,
            loss=with_loss,
            metrics=list(metrics),
            weighted_metrics=[],
        )
        model.optimizer.build(model.trainable_variables)
        first = keeper.start()
        if first < epochs and not keeper.stopped:
            batches, weights = devices.training(
                train.epochs(first) if endless else train,
                dict(class_weight) if class_weight else None,
            )
            model.fit(
                batches,
                epochs=epochs,
                initial_epoch=first,
                steps_per_epoch=steps if endless or steps_per_epoch else None,
                validation_data=devices.validation(validation),
                class_weight=weights,
                callbacks=[
                    *callbacks,
                    *devices.callbacks(backend),
                    *reporter.callbacks(backend),
                    keeper.callback(),
                ],
                shuffle=False,  # batches come in their order; Keras 3 warns of anything else
                verbose=0,
            )
        return keeper.finish()


def _require_trainable(model: Any) -> None:
    layers = lora_layers(model)
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"Received model '{model.name}', of which {len(merged)} layers are merged: "
            f"{', '.join(merged[:5])}. Call unmerge_lora_weights before training."
        )


def _steps(train: Any, steps_per_epoch: int | None) -> int:
    """The number of batches in an epoch."""
    if steps_per_epoch is not None:
        check_whole("steps_per_epoch", steps_per_epoch, 1)
        return steps_per_epoch
    if isinstance(train, Epochs):
        return train.steps_per_epoch
    try:
        steps = len(train)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(
            f"Received train={train!r}, whose number of batches is not known or is zero. Pass "
            "steps_per_epoch, or a dataset that knows its length."
        )
    return steps


def _cross_entropy(backend: Any, devices: Devices) -> Any:
    entropy = backend.keras.losses.sparse_categorical_crossentropy

    def cross_entropy(labels: Any, logits: Any) -> Any:
        # Under mixed precision the logits are 16-bit, in which a softmax loses digits.
        logits = backend.ops.cast(logits, "float32")
        return devices.by_share(entropy(labels, logits, from_logits=True))

    return cross_entropy


class _Keeper:
    """What is remembered from epoch to epoch: numbers, best weights, and the state on disk."""

    def __init__(
        self,
        model: Any,
        devices: Devices,
        out: Path | None,
        *,
        monitor: str | None,
        patience: int | None,
        seed: int,
        fingerprint: dict[str, Any],
    ) -> None:
        self.model, self.out, self.monitor, self.patience = model, out, monitor, patience
        self.backend, self.writes = backend_of(model), devices.is_chief
        self.seed = seed + devices.worker  # workers drop out different features
        self.progress = Progress(fingerprint=fingerprint)
        self.checkpoints = Checkpoints(out / STATE) if out is not None else None
        self.best_values: dict[str, np.ndarray] | None = None

    # -- before training ---------------------------------------------------------------

    def look(self, resume: bool) -> None:
        """Read what there is; raise if it must not be there or does not fit."""
        found = self.checkpoints.last() if self.checkpoints is not None else None
        if found is None:
            return
        if not resume:
            raise ValueError(
                f"There is the state of a training in {self.out}, after epoch {found.epoch}. "
                "Pass resume=True to go on with it, or another folder."
            )
        expected = self.progress.fingerprint
        if found.fingerprint != expected:
            differing = [k for k in expected if found.fingerprint.get(k) != expected[k]]
            told = [f"{k}={found.fingerprint.get(k)}, now {expected[k]}" for k in differing]
            raise ValueError(
                f"The training in {self.out} was started otherwise: {'; '.join(told)}. Go on "
                "with the same values, or start anew in another folder."
            )
        self.progress = found

    def start(self) -> int:
        """Give the model the values of the state; return the epoch to go on with."""
        done = self.progress.epoch
        if done and self.checkpoints is not None:
            give_values(self.model, self.model.optimizer, self.checkpoints.values(done - 1))
            best = self.progress.best
            if best is not None:
                self.best_values = self.checkpoints.values(best)
            self._write_metrics()
        return done

    # -- during training ---------------------------------------------------------------

    def callback(self) -> Any:
        """The Keras callback; it comes last, so that it sees what others decided."""
        return self.backend.keras.callbacks.LambdaCallback(
            on_epoch_begin=self._begin, on_epoch_end=self._end
        )

    def _begin(self, epoch: int, logs: Any = None) -> None:
        self.backend.restart_random_ops(self.seed)

    def _end(self, epoch: int, logs: Any = None) -> None:
        numbers = {name: float(value) for name, value in (logs or {}).items()}
        if not np.isfinite(numbers.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss is {numbers['loss']} in epoch {epoch + 1}: the training has "
                "diverged. Lower the learning_rate, or warm up for longer. The state of the "
                "epoch before is kept."
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
                f"Received monitor={self.monitor!r}, which is not among what is measured: "
                f"{', '.join(numbers)}."
            )
        if best is None:
            return True
        now, before = numbers[self.monitor], self.progress.history[best][self.monitor]
        return now < before if "loss" in self.monitor else now > before

    @property
    def stopped(self) -> bool:
        """Whether patience is at its end."""
        best = self.progress.best
        if self.patience is None or best is None:
            return False
        return self.progress.epoch - 1 - best >= self.patience

    # -- after training ----------------------------------------------------------------

    def finish(self) -> Trained:
        """Give the model its best weights."""
        best = self.progress.best
        assert best is not None and self.best_values is not None
        give_values(self.model, None, self.best_values)
        self._save_adapter()
        return Trained(self.progress.history, best + 1, self.stopped)

    def _save_adapter(self) -> None:
        if self.out is not None:
            adapter = adapter_of(self.model)  # by all workers: some values are means of theirs
            if self.writes:
                adapter.save(self.out / ADAPTER)

    def _write_metrics(self) -> None:
        if self.out is not None and self.writes:
            write_metrics(self.out / METRICS, self.progress.history)
