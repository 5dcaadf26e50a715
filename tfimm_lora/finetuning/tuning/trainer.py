"""``Trainer``: train one model again and again from the same start, without a new trace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.checkpoint import restore_values, values_of
from tfimm_lora.finetuning.distributed.current import devices_of
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.optimizer import create_adamw, rate_of_step
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.of_model import task_to_train
from tfimm_lora.finetuning.training import (
    Epochs,
    count_steps,
    default_loss,
    example_batch,
    require_unmerged,
)

#: The rate of step ``i`` (from 0) of a training.
Rates = Callable[[int], float]
#: Called after an epoch with its index from 0 and its metrics; True ends the training.
AfterEpoch = Callable[[int, dict[str, float]], bool]


class Trainer:
    """Trains a model as ``finetune`` does, many times, each time from its present values.

    The learning rate is a variable of the optimizer that is assigned before each step, because
    a schedule would be a constant of the traced function: another rate or another number of
    epochs would need another trace, which takes longer than a few epochs on few pictures.

    Use it in a ``with`` block. The model keeps the values of the last training; ``reset``
    restores those that it had at first.

    Args:
        model: The LoRA model. It is compiled.
        train: The batches, as for ``finetune``.
        validation: Batches to evaluate after each epoch, as for ``finetune``.
        weight_decay, clip_norm, loss, metrics, task, class_weight, steps_per_epoch, seed: As
            for ``finetune``.

    Raises:
        ValueError: if the model has no LoRA layers, is merged, or is on several devices.
    """

    def __init__(
        self,
        model: Any,
        train: Any,
        validation: Any = None,
        *,
        weight_decay: float,
        clip_norm: float,
        loss: Any = None,
        metrics: Sequence[Any] | None = None,
        task: Task | None = None,
        class_weight: Mapping[int, float] | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        require_unmerged(model)
        devices = devices_of(model)
        if type(devices) is not Devices:
            raise ValueError(
                f"Received a model on {devices}; expected one device. Search on one device, "
                "or let several processes share a search with storage=..., and pass what was "
                "found to the training on several devices."
            )
        self.backend, self.model = backend_of(model), model
        self.devices, self.train = devices, train
        self.validation = devices.validation(validation)
        self.steps = count_steps(train, steps_per_epoch)
        self._is_infinite = isinstance(train, Epochs) or steps_per_epoch is not None
        task = task_to_train(model, task, loss)
        weighs = bool(class_weight) and task.weighs_examples
        self.class_weight = dict(class_weight or {}) if weighs else None
        self.seed = seed
        model.compile(
            optimizer=create_adamw(self.backend.keras, 1.0, weight_decay, clip_norm),
            loss=(
                default_loss(self.backend, devices, task, class_weight)
                if loss is None
                else loss
            ),
            metrics=task.metrics(self.backend) if metrics is None else list(metrics),
            weighted_metrics=[],
        )
        model.optimizer.build(model.trainable_variables)
        batches = train.epochs(0) if isinstance(train, Epochs) else train
        example = example_batch(batches)
        if example is not None:
            self.backend.create_metrics(model, example)
        self._initial = values_of(model, model.optimizer)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trainer:
        # For all trainings, because a traced function draws from the generator of this block.
        ops = self.backend.restartable_random_ops(self.model, self.seed)
        self._restart = self._stack.enter_context(ops)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def reset(self) -> None:
        """Restore the values that the model and its optimizer had at first."""
        restore_values(self.model, self.model.optimizer, self._initial)

    def scheduled(self, epochs: int, learning_rate: float, warmup: float) -> Rates:
        """The rates of ``finetune`` for a number of epochs."""
        steps = epochs * self.steps
        return lambda step: rate_of_step(step, steps, learning_rate, warmup)

    def fit(
        self,
        rates: Rates,
        epochs: int = 1,
        *,
        steps: int | None = None,
        after_epoch: AfterEpoch = lambda epoch, metrics: False,
        after_step: Callable[[float], None] | None = None,
    ) -> None:
        """Train for a number of epochs.

        Args:
            rates: The rate of each step.
            epochs: The number of epochs.
            steps: The number of steps in an epoch, if not all.
            after_epoch: Called after each epoch.
            after_step: Called with the loss of each step.
        """
        steps_per_epoch = steps or (self.steps if self._is_infinite else None)
        create = _callback_class(self.backend)
        callback = create(rates, self._restart, after_epoch, after_step)
        batches, weights = self.devices.training(self.train, 0, self.class_weight)
        self.model.stop_training = False
        self.model.fit(
            batches,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            validation_data=self.validation,
            class_weight=weights,
            callbacks=[callback],
            shuffle=False,
            verbose=0,
        )


@functools.cache
def _callback_class(backend: Backend) -> Any:
    """A Keras callback that sets the rate of each step.

    The class is created once: Keras keeps what the methods of a class refer to.
    """

    # The attribute ``model`` of a callback gives the current values to the variables on JAX,
    # where ``fit`` keeps them elsewhere.
    class RateOfEachStep(backend.keras.callbacks.Callback):  # type: ignore[misc, name-defined]
        def __init__(
            self,
            rates: Rates,
            restart: Callable[[int], None],
            after_epoch: AfterEpoch,
            after_step: Callable[[float], None] | None,
        ) -> None:
            super().__init__()
            self.rates, self.restart, self.step = rates, restart, 0
            self.after_epoch, self.after_step = after_epoch, after_step

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.restart(epoch)

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            model = self.model
            model.optimizer.learning_rate = self.rates(self.step)
            if self.after_step is not None:
                model.reset_metrics()  # so that the loss is not the mean of all steps
            self.step += 1

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self.after_step is not None:
                self.after_step(float(logs["loss"]))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            numbers = {name: float(value) for name, value in (logs or {}).items()}
            if self.after_epoch(epoch, numbers):
                self.model.stop_training = True

    return RateOfEachStep
