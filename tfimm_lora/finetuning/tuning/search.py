"""``Search``: take the next training from a study, train, and report, until nothing is left.

A trial of Optuna is one training: settings and a number of epochs. Optuna's own pruners stop a
trial, but cannot train it again for longer. Here a setting that is promoted to the next rung is
a new trial, enqueued in the study. So all that a search knows is in its storage, any process
that shares the storage can take any training, and a killed search continues.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfimm_lora.finetuning.tuning.record import TunedTrial, rank_key, worst_value
from tfimm_lora.finetuning.tuning.rungs import REDUCTION, Rung
from tfimm_lora.finetuning.tuning.space import Space
from tfimm_lora.finetuning.tuning.storage import require_optuna

#: The attributes of a trial: the epochs of its schedule, what it is (a start or a promotion,
#: which must not be trained twice), and the result.
EPOCHS, KEY, RATE, METRICS, SECONDS, WORKER = (
    *("epochs", "key", "learning_rate", "metrics"),
    *("seconds", "worker"),
)
#: Rates of one rank whose ratio is less than this are nearly the same.
_NEAR = 1.3
#: How often to look for another setting: first as the sampler proposes, then at random.
_ATTEMPTS = 20
#: How long to wait for the trainings of other processes, in seconds.
POLL = 0.5


@dataclass(frozen=True)
class Outcome:
    """The result of a training.

    Attributes:
        value: The monitored metric of the best epoch; None if the training diverged.
        metrics: All metrics of that epoch.
        complete: Whether all epochs were trained.
    """

    value: float | None
    metrics: dict[str, float]
    complete: bool = True


#: Trains with (learning rate, rank, epochs, whether to stop after an epoch).
Train = Callable[[float, int, int, Callable[[int], bool]], Outcome]


class Search:
    """A search in a study, until all rungs are complete or the time is over.

    Args:
        study: The study, from ``open_study``.
        space: The settings to choose from.
        starts: The settings to try first.
        ladder: The rungs.
        monitor: The metric to compare.
        train: The function that trains.
        seconds: The time for this process.
        seed: The seed of the sampler.
        say: Called with a message after each training.
    """

    def __init__(
        self,
        study: Any,
        space: Space,
        starts: list[tuple[float, int]],
        ladder: list[Rung],
        *,
        monitor: str,
        train: Train,
        seconds: float,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.optuna, self.study, self.space, self.ladder = (
            require_optuna(),
            study,
            space,
            ladder,
        )
        self.starts = starts[: ladder[0].count]
        self.monitor, self.train, self.seed, self.say = monitor, train, seed, say
        self.worker = f"{platform.node()} {os.getpid()}"
        self.deadline = time.monotonic() + seconds
        self.speeds: dict[int, float] = {}  # the seconds of an epoch, by rank
        self.timed_out = False

    # -- what others have done, too ----------------------------------------------------

    def finished(self) -> tuple[TunedTrial, ...]:
        """The trainings that are complete, by this and by other processes."""
        states = self.optuna.trial.TrialState
        done = self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))
        return tuple(self._record(trial) for trial in done)

    def _record(self, trial: Any) -> TunedTrial:
        attributes = trial.user_attrs
        value = next(iter(trial.intermediate_values.values()))
        return TunedTrial(
            number=trial.number,
            learning_rate=attributes[RATE],
            rank=self._rank(trial),
            epochs=attributes[EPOCHS],
            value=value if math.isfinite(value) else None,
            metrics=attributes[METRICS],
            seconds=attributes[SECONDS],
            worker=attributes[WORKER],
        )

    def _rank(self, trial: Any) -> int:
        return int(trial.params.get("rank", self.space.ranks[0]))

    def _kept(self) -> list[Any]:
        """All trials except those that failed, were interrupted or are superfluous."""
        failed = self.optuna.trial.TrialState.FAIL
        return [x for x in self.study.get_trials(deepcopy=False) if x.state != failed]

    # -- the loop ----------------------------------------------------------------------

    def continue_alone(self) -> None:
        """Continue a search that no other process shares.

        What was running when it was killed is given up, and the time that it took counts.
        """
        running = (self.optuna.trial.TrialState.RUNNING,)
        for trial in self.study.get_trials(deepcopy=False, states=running):
            self._give_up(trial)
        self.deadline -= sum(trial.seconds for trial in self.finished())

    def run(self) -> None:
        """Train until all rungs are complete or the time is over."""
        self._enqueue_starts()
        while not self.timed_out and (rung := self._next_rung()) is not None:
            if self._is_out_of_time(rung.epochs):
                self.timed_out = True
                return
            if rung.count:
                self._train_one()
            else:
                time.sleep(POLL)

    def _enqueue_starts(self) -> None:
        keys = {trial.user_attrs.get(KEY) for trial in self._kept()}
        for i, (rate, rank) in enumerate(self.starts):
            if f"start {i}" not in keys:
                self._enqueue(rate, rank, self.ladder[0].epochs, f"start {i}")

    def _enqueue(self, rate: float, rank: int, epochs: int, key: str) -> None:
        values = {"learning_rate": rate} if self.space.searches_rate else {}
        if self.space.searches_rank:
            values["rank"] = rank
        self.study.enqueue_trial(values, user_attrs={EPOCHS: epochs, KEY: key, RATE: rate})

    def _next_rung(self) -> Rung | None:
        """What to train next: 1 or 0 settings, for a number of epochs; None: all is complete.

        0 settings means to wait for other processes. Settings that are to be trained longer are
        enqueued.
        """
        kept, states = self._kept(), self.optuna.trial.TrialState
        if any(trial.state == states.WAITING for trial in kept):
            waiting = min(t.number for t in kept if t.state == states.WAITING)
            epochs = next(t.user_attrs[EPOCHS] for t in kept if t.number == waiting)
            return Rung(1, epochs)
        if len(self._on_rung(kept, 0)) < self.ladder[0].count:
            return Rung(1, self.ladder[0].epochs)
        if any(trial.state == states.RUNNING for trial in kept):
            return Rung(0, 0)
        for level in range(1, len(self.ladder)):
            if self._promote(kept, level):
                return Rung(1, self.ladder[level].epochs)
        return None

    def _on_rung(self, kept: list[Any], level: int) -> list[Any]:
        epochs = self.ladder[level].epochs
        return [x for x in kept if x.user_attrs.get(EPOCHS, self.ladder[0].epochs) == epochs]

    def _promote(self, kept: list[Any], level: int) -> bool:
        """Enqueue the best settings of the rung below that are not on this one; whether any."""
        below = [self._record(trial) for trial in self._on_rung(kept, level - 1)]
        ranked = sorted(below, key=lambda trial: rank_key(trial, self.monitor))
        best = [x for x in ranked if x.value is not None][: self.ladder[level].count]
        if len(best) < 2:
            return False  # one alone decides nothing
        epochs = self.ladder[level].epochs
        known = {trial.user_attrs.get(KEY) for trial in kept}
        keys = {f"{trial.number} for {epochs} epochs": trial for trial in best}
        missing = [key for key in keys if key not in known]
        for key in missing:
            self._enqueue(keys[key].learning_rate, keys[key].rank, epochs, key)
        return bool(missing)

    # -- one training ------------------------------------------------------------------

    def _train_one(self) -> None:
        trial = self._ask()
        if trial is None:
            return
        rate, rank = trial.user_attrs[RATE], self._rank(trial)
        epochs = trial.user_attrs[EPOCHS]
        states = self.optuna.trial.TrialState
        started = time.monotonic()
        times = [started]

        def is_over(epoch: int) -> bool:
            times.append(time.monotonic())
            self.speeds[rank] = min(b - a for a, b in itertools.pairwise(times))
            return epoch + 1 < epochs and self._is_out_of_time(epochs - epoch - 1)

        try:
            outcome = self.train(rate, rank, epochs, is_over)
        except BaseException:
            self._give_up(trial)
            raise
        if not outcome.complete:
            self.timed_out = True
            self._give_up(trial)
            return
        seconds = time.monotonic() - started
        trial.set_user_attr(METRICS, outcome.metrics)
        trial.set_user_attr(SECONDS, round(seconds, 2))
        trial.set_user_attr(WORKER, self.worker)
        value = worst_value(self.monitor) if outcome.value is None else outcome.value
        trial.report(value, epochs)
        # Optuna's sampler ranks pruned trials by their epochs, and then by their value.
        if epochs < self.ladder[-1].epochs or outcome.value is None:
            self.study.tell(trial.number, state=states.PRUNED)
        else:
            self.study.tell(trial.number, value)
        result = "diverged" if outcome.value is None else _listed(outcome.metrics)
        self.say(
            f"trial {trial.number}: rate {rate:g}, rank {rank}, "
            f"{epochs} epoch{'s' if epochs > 1 else ''}: {result}  {seconds:.1f} s"
        )

    def _ask(self) -> Any:
        """The next trial, or None if another process has taken it meanwhile."""
        for attempt in range(_ATTEMPTS):
            trial = self._suggested(at_random=2 * attempt >= _ATTEMPTS)
            if self._is_superfluous(trial):
                self._give_up(trial)
                return None
            if KEY in trial.user_attrs or not self._is_known(trial):
                return trial
            if attempt + 1 < _ATTEMPTS:
                self._give_up(trial)
        return trial

    def _suggested(self, at_random: bool) -> Any:
        trial = self.study.ask()
        # A sampler for each trial, so that neither a continued search nor another process that
        # asks at the same time repeats its random numbers.
        seed = self.seed + trial.number
        self.study.sampler = (
            self.optuna.samplers.RandomSampler(seed=seed)
            if at_random
            else self._proposing_sampler(seed)
        )
        rate = self.space.rates[0]
        if self.space.searches_rate:
            rate = trial.suggest_float("learning_rate", *self.space.rates, log=True)
        if self.space.searches_rank:
            trial.suggest_categorical("rank", self.space.ranks)
        if EPOCHS not in trial.user_attrs:
            trial.set_user_attr(EPOCHS, self.ladder[0].epochs)
            low, high = self.space.rates
            trial.set_user_attr(RATE, min(max(float(f"{rate:.2g}"), low), high))
        return trial

    def _proposing_sampler(self, seed: int) -> Any:
        """TPE. Of its good trials, by default the best tenth, it would have one, and propose
        settings far away from it; here the best third are good."""
        with warnings.catch_warnings():
            # Optuna 6 is going to remove gamma; setup.cfg excludes it.
            warnings.filterwarnings("ignore", ".*gamma.*", FutureWarning)
            return self.optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=len(self.starts),
                gamma=lambda count: math.ceil(count / REDUCTION),
                n_ei_candidates=8,
            )

    def _give_up(self, trial: Any) -> None:
        self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)

    def _is_known(self, trial: Any) -> bool:
        """Whether nearly the same setting was tried, which the sampler likes to suggest."""
        rate, rank = trial.user_attrs[RATE], self._rank(trial)
        return any(
            self._rank(x) == rank
            and 1 / _NEAR < x.user_attrs.get(RATE, math.inf) / rate < _NEAR
            for x in self._kept()
            if x.number < trial.number
        )

    def _is_superfluous(self, trial: Any) -> bool:
        """Whether other processes enqueued or took the same training at the same time."""
        before = [x for x in self._kept() if x.number < trial.number]
        key = trial.user_attrs.get(KEY)
        if key is not None:
            return any(x.user_attrs.get(KEY) == key for x in before)
        return len(self._on_rung(before, 0)) >= self.ladder[0].count

    def _is_out_of_time(self, epochs: int) -> bool:
        """Whether this many epochs do not fit into the time that is left.

        The first training is always completed. No epochs means to wait for other processes.
        """
        if epochs and not self.finished():
            return False
        expected = epochs * max(self.speeds.values(), default=0.0)
        return time.monotonic() + expected >= self.deadline


def _listed(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if name.startswith("val_")]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
