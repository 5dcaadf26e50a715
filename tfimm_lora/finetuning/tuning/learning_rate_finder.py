"""``find_learning_rate``: one pass with a growing learning rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.finetuning.checkpoint import restore_values, values_of
from tfimm_lora.finetuning.optimizer import CLIP_NORM
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.of_model import task_to_train
from tfimm_lora.finetuning.training import count_steps
from tfimm_lora.finetuning.tuning.trainer import Trainer
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.validation import check_integer, check_number

#: With fewer steps the curve is noise. More than the usual number show nothing new.
FEWEST_STEPS, USUAL_STEPS = 20, 100

#: The width of the smoothing, in factors of ten of the rate (a standard deviation).
_WIDTH = 0.2


@dataclass(frozen=True)
class LearningRateCurve:
    """The losses at growing learning rates.

    Attributes:
        rates: The rate of each step, (n,).
        losses: The loss of each step, before it, (n,). Not finite after a divergence.
        smoothed: The smoothed losses up to the first that is not finite, (m,) with m <= n.
        suggestion: A tenth of the rate at which the smoothed loss is lowest.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float


def find_learning_rate(
    model: Any,
    train: Any,
    *,
    lowest: float = 1e-5,
    highest: float = 1.0,
    steps: int | None = None,
    weight_decay: float = 0.01,
    clip_norm: float = CLIP_NORM,
    loss: Any = None,
    task: Task | None = None,
    class_weight: Mapping[int, float] | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
) -> LearningRateCurve:
    """Find a learning rate for ``finetune`` in one pass over the training data, or less.

    The model is trained with AdamW, and the rate of step i of n is

        lowest * (highest / lowest) ** (i / (n - 1)).

    The suggestion is a tenth of the rate at which the loss, smoothed over the logarithm of the
    rate, is lowest. (The rate at which it falls fastest is another common suggestion. Few steps
    on small batches do not determine it: the noise of single losses is as steep.) Compared with
    ``tune``, this costs little and knows little: it sees the first steps only, and no
    validation data.

    Nothing changes: the values of the model, how it is compiled, and its optimizer are as
    before.

    Args:
        model: A LoRA model that returns logits (n, classes).
        train: The batches, as for ``finetune``.
        lowest, highest: The rates of the first and the last step. Default: 1e-5 and 1.
        steps: The number of steps, at least 20. Default: 100, or the number of batches if
            there are fewer.
        weight_decay, clip_norm, loss, task, class_weight, steps_per_epoch, seed: As for
            ``finetune``.

    Returns:
        The rates, the losses and the suggestion.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value that is out of range, fewer than 20 batches, or a model that
            ``finetune`` would refuse.
        FloatingPointError: if the loss never falls, or a suggestion below ``lowest``.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
        >>> x = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
        >>> train = tf.data.Dataset.from_tensor_slices((x, x[:, :3].argmax(1))).batch(4)
        >>> curve = lora.find_learning_rate(model, train)
        >>> len(curve.rates), 1e-5 < curve.suggestion < 1
        (50, True)

    Reference: Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186.
    """
    task = task_to_train(model, task, loss)
    check_number(lowest, "lowest", 0, exclusive=True)
    check_number(highest, "highest", lowest, exclusive=True)
    available = count_steps(train, steps_per_epoch)
    steps = min(available, USUAL_STEPS) if steps is None else steps
    check_integer(steps, "steps", FEWEST_STEPS)
    if steps > available:
        raise ValueError(
            f"Received {available} batches for {steps} steps; expected as many, in one pass. "
            "Use smaller batches or fewer steps, or use lora.tune."
        )
    rates = lowest * (highest / lowest) ** (np.arange(steps) / (steps - 1))
    losses: list[float] = []
    with _kept(model):
        # A model around this one, so that it stays compiled as it is.
        trainer = Trainer(
            _around(model),
            train,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            loss=loss,
            metrics=(),
            task=task,
            class_weight=class_weight,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
        )
        with trainer:
            trainer.fit(lambda step: float(rates[step]), steps=steps, after_step=losses.append)
    return curve_of(rates, np.array(losses))


@contextlib.contextmanager
def _kept(model: Any) -> Iterator[None]:
    """Restore everything in a model that training changes at the end of the block."""
    lora_layers(model)  # raises if there are none
    before = values_of(model, None)
    try:
        yield
    finally:
        restore_values(model, None, before)


def _around(model: Any) -> Any:
    backend = backend_of(model)

    class Around(backend.keras.Model):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def call(self, inputs: Any, training: Any = None) -> Any:
            return self.inside(inputs, training=training)

    return Around()


def curve_of(rates: np.ndarray, losses: np.ndarray) -> LearningRateCurve:
    """Smooth the losses and suggest a rate.

    Raises:
        FloatingPointError: if the loss never falls, or a suggestion below ``lowest``.
    """
    is_finite = np.isfinite(losses)
    count = len(losses) if is_finite.all() else int(np.argmin(is_finite))
    smoothed = _smoothed(np.log10(rates[:count]), losses[:count])
    lowest = int(np.argmin(smoothed)) if count else 0
    if lowest < 1:
        raise FloatingPointError(
            f"The loss never falls at rates from {rates[0]:g} to {rates[-1]:g}. Start with a "
            "lower rate, or check the labels and the normalization of the inputs."
        )
    if rates[lowest] < 10 * rates[0]:
        raise FloatingPointError(
            f"The loss is lowest at the rate {rates[lowest]:.2g}, and a tenth of it is below "
            f"the lowest rate that was tried, {rates[0]:g}: the loss hardly falls, or it is "
            "too noisy. Use larger batches, more pictures or a lower rate to start with; or "
            "search with lora.tune (--lr auto)."
        )
    return LearningRateCurve(rates, losses, smoothed, float(f"{rates[lowest] / 10:.2g}"))


def _smoothed(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of the values, weighted by the distance of their places."""
    weights = np.exp(-0.5 * ((places[:, None] - places) / _WIDTH) ** 2)
    means: np.ndarray = weights @ values / weights.sum(1)
    return means
