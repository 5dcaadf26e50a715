"""``tune``: search for the learning rate and the rank with which a model trains best."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfimm_lora.finetuning.data.findings import count
from tfimm_lora.finetuning.monitor import is_minimized
from tfimm_lora.finetuning.optimizer import CLIP_NORM
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.training import count_steps
from tfimm_lora.finetuning.tuning.record import Tuned, best_trial
from tfimm_lora.finetuning.tuning.rungs import Rung, rungs
from tfimm_lora.finetuning.tuning.search import Outcome, Search
from tfimm_lora.finetuning.tuning.space import RATES, Space, usual_ranks
from tfimm_lora.finetuning.tuning.storage import open_study
from tfimm_lora.finetuning.tuning.trainer import Trainer
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.validation import check_integer, check_number, check_rank


def tune(
    create_model: Callable[[int], Any],
    train: Any,
    validation: Any,
    *,
    minutes: float,
    learning_rate: float | Sequence[float] = RATES,
    rank: int | Sequence[int] | None = None,
    epochs: int,
    trials: int | None = None,
    first: tuple[float | None, int | None] = (None, None),
    weight_decay: float = 0.01,
    clip_norm: float = CLIP_NORM,
    warmup: float = 0.1,
    loss: Any = None,
    metrics: Sequence[Any] | None = None,
    task: Task | None = None,
    class_weight: Mapping[int, float] | None = None,
    monitor: str = "val_loss",
    steps_per_epoch: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Search for the learning rate and the rank with which a model trains best.

    Successive halving: all settings are trained for a few epochs, the best third again for
    three times as many, and so on, each time with a complete schedule and from the same initial
    weights. Usual rates are tried first; Optuna's TPE sampler proposes the others from the
    results. All trainings of one rank use one model and one traced function.

    A search with the default of six settings costs about as much as one full training, and is
    repeatable if the time suffices.

    Args:
        create_model: A function of a rank that creates the LoRA model, always with the same
            initial values. It is called once for each rank, and the models are kept until the
            search ends.
        train: The batches to train on, as for ``finetune``.
        validation: Batches to compare the settings on, as for ``finetune``. Take them from the
            training data: the validation data of the final training should not choose its
            settings, too.
        minutes: The time for this process. A training that does not fit into it is not started,
            or is stopped after an epoch. The first training is always completed.
        learning_rate: The lowest and the highest rate to search, or a rate that is not
            searched. Default: 1e-4 to 3e-2.
        rank: The ranks to choose from, or one that is not searched. Default: that of
            ``LoRAConfig``, twice and four times as many.
        epochs: The epochs of the full training, for which the settings are searched.
        trials: The number of settings to try. Default: 6, or the number of ranks if the rate is
            not searched. With 9 or more, the best ones are trained for all epochs if there are
            two of them.
        first: The rate and the rank to try first. Default: usual rates, the first rank.
        weight_decay, warmup, clip_norm, loss, metrics, task, class_weight, steps_per_epoch: As
            for ``finetune``.
        monitor: The metric to compare, by its best epoch. Default: "val_loss", since accuracies
            on few examples are often equal.
        storage: The path of a journal file, from which the same call continues an interrupted
            search, or the URL of a database. Processes with the same storage share the search.
            Default: in memory.
        seed: The seed of the sampler and, as for ``finetune``, of dropout.
        say: A function that is called with a message after each training.

    Returns:
        The chosen settings and all trainings.

    Raises:
        TypeError, ValueError: for a value that is out of range, a search without choices, a
            storage with another search, or a model with another rank than it should have.
        FloatingPointError: if all trainings diverged.
        ImportError: without Optuna.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> def create_model(rank):
        ...     tf.keras.utils.set_random_seed(0)
        ...     model = tf.keras.Sequential([
        ...         tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc"),
        ...         tf.keras.layers.Dense(3, name="head")])
        ...     return lora.inject_lora(model, lora_rank=rank, lora_train_classifier=True)
        >>> x, y = np.eye(4, dtype="float32"), np.array([0, 1, 2, 2])
        >>> train = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        >>> tuned = lora.tune(create_model, train, train, minutes=5, rank=(1, 2), epochs=3)
        >>> tuned.rank in (1, 2), len(tuned.trials)
        (True, 6)

    Reference: Akiba et al., "Optuna", arXiv:1907.10902; Jamieson & Talwalkar, arXiv:1502.07943.
    """
    space = Space.of(learning_rate, usual_ranks() if rank is None else rank)
    check_number(minutes, "minutes", 0, exclusive=True)
    check_integer(epochs, "epochs", 1)
    check_number(warmup, "warmup", 0, below=1)
    check_number(weight_decay, "weight_decay", 0)
    check_number(clip_norm, "clip_norm", 0)
    check_integer(seed, "seed", 0)
    starts = space.starts(*_checked_first(first))
    steps = count_steps(train, steps_per_epoch)
    ladder = rungs(number_of_trials(trials, space), epochs, steps)
    study = open_study(
        storage,
        {
            **search_settings(space, ladder, epochs, monitor, seed),
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "warmup": warmup,
            "task": None if task is None else task.name,
            "class_weight": sorted((class_weight or {}).items()),
        },
        direction=direction(monitor),
    )

    def open_trainer(of_rank: int) -> Trainer:
        model = create_model(of_rank)
        _check_rank_of(model, of_rank)
        return Trainer(
            model,
            train,
            validation,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            loss=loss,
            metrics=metrics,
            task=task,
            class_weight=class_weight,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
        )

    with Trainers(open_trainer, warmup, monitor) as trainers:
        search = Search(
            study,
            space,
            starts,
            ladder,
            monitor=monitor,
            train=trainers.train,
            seconds=60 * minutes,
            seed=seed,
            say=say,
        )
        search.run()
    return conclude(search, epochs)


def _checked_first(first: Any) -> tuple[float | None, int | None]:
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        raise TypeError(
            f"Received first={first!r}; expected a rate and a rank, each of which may be None."
        )
    rate, rank = first
    if rate is not None:
        check_number(rate, "first[0]", 0, exclusive=True)
    if rank is not None:
        check_rank(rank, "first[1]")
    return rate, rank


def _check_rank_of(model: Any, rank: int) -> None:
    """Raise if no LoRA layer has the rank with which a model was to be created."""
    found = sorted({int(layer.lora.lora_rank) for layer in lora_layers(model).values()})
    if rank not in found:
        raise ValueError(
            f"create_model({rank}) returned a model with layers of rank "
            f"{', '.join(map(str, found))}; expected rank {rank}. Create a new model with the "
            "rank that the function receives."
        )


class Trainers:
    """One ``Trainer`` for each rank, created when it is needed.

    Args:
        open_trainer: Creates the trainer of a rank.
        warmup: The share of the steps for warm-up.
        monitor: The metric to compare.
    """

    def __init__(
        self, open_trainer: Callable[[int], Trainer], warmup: float, monitor: str
    ) -> None:
        self._open, self.warmup, self.monitor = open_trainer, warmup, monitor
        self._opened: dict[int, Trainer] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.clear()
        self._stack.close()

    def train(
        self, rate: float, rank: int, epochs: int, is_over: Callable[[int], bool]
    ) -> Outcome:
        """Train with a complete schedule; the function that ``Search`` calls."""
        if rank not in self._opened:
            self._opened[rank] = self._stack.enter_context(self._open(rank))
        trainer, history = self._opened[rank], list[dict[str, float]]()

        def after_epoch(epoch: int, metrics: dict[str, float]) -> bool:
            if self.monitor not in metrics:
                raise ValueError(
                    f"Received monitor={self.monitor!r}; expected one of the metrics: "
                    f"{', '.join(metrics)}."
                )
            history.append(metrics)
            return is_over(epoch) or not _is_finite(metrics, self.monitor)

        trainer.reset()
        trainer.fit(
            trainer.scheduled(epochs, rate, self.warmup), epochs, after_epoch=after_epoch
        )
        if not all(_is_finite(metrics, self.monitor) for metrics in history):
            return Outcome(None, {})
        choose = min if is_minimized(self.monitor) else max
        best = choose(history, key=lambda x: x[self.monitor])
        return Outcome(best[self.monitor], best, complete=len(history) == epochs)


def _is_finite(metrics: Mapping[str, float], monitor: str) -> bool:
    return math.isfinite(metrics[monitor]) and math.isfinite(metrics.get("loss", 0.0))


def number_of_trials(trials: int | None, space: Space) -> int:
    """The number of settings to try."""
    if trials is None:
        return space.usual_trials()
    check_integer(trials, "trials", 2)
    return trials if space.searches_rate else min(trials, len(space.ranks))


def direction(monitor: str) -> str:
    """Optuna's direction for a metric."""
    return "minimize" if is_minimized(monitor) else "maximize"


def search_settings(
    space: Space, ladder: Sequence[Rung], epochs: int, monitor: str, seed: int
) -> dict[str, Any]:
    """What has to be the same when a search is continued or shared."""
    return {
        "rates": list(space.rates),
        "ranks": list(space.ranks),
        "rungs": [[rung.count, rung.epochs] for rung in ladder],
        "epochs": epochs,
        "monitor": monitor,
        "seed": seed,
    }


def conclude(
    search: Search,
    epochs: int,
    *,
    pictures: tuple[int, int] | None = None,
    recipe: Any = None,
) -> Tuned:
    """Choose the best setting, and say what was found and what the time did not suffice for."""
    trials, planned = search.finished(), sum(rung.count for rung in search.ladder)
    if not trials:
        raise RuntimeError(
            "No training of the search is complete: the time was over while other processes "
            "trained. Allow more minutes, and call this again to continue."
        )
    best, space = best_trial(trials, search.monitor), search.space
    tuned = Tuned(
        best.learning_rate,
        best.rank,
        search.monitor,
        trials,
        space.rates,
        space.ranks,
        epochs,
        pictures,
        recipe,
    )
    if search.timed_out:
        search.say(
            f"the time is over after {len(trials)} of {planned} trainings; more minutes would "
            "make the choice more reliable"
        )
    search.say(
        f"chosen: rate {best.learning_rate:g}, rank {best.rank} ({search.monitor} "
        f"{best.value:.4f} after {count(best.epochs, 'epoch')}), from "
        f"{count(len(trials), 'training')} with {count(tuned.epochs_trained, 'epoch')} in "
        f"{tuned.seconds:.0f} s"
    )
    tried = {trial.rank for trial in trials}
    untried = [str(rank) for rank in space.ranks if rank not in tried]
    if untried:
        search.say(
            f"not tried: rank {', '.join(untried)}; more trials or minutes include other ranks"
        )
    if space.searches_rate and best.learning_rate in space.rates:
        search.say(
            f"{best.learning_rate:g} is at the end of the range of rates; a wider range may "
            "have a better one"
        )
    return tuned
