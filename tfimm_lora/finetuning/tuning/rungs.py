"""Successive halving: how long each setting is trained, and which ones are trained longer.

All settings are trained for a few epochs, and the best third again for three times as many, and
so on. Each training has a complete schedule of its own, from warm-up to zero, and starts from
the initial weights. The alternative, to stop the trainings of the full schedule after a few
epochs and to continue the best, would save these epochs, but it would compare rates that have
not decayed yet: a high rate looks worse than it will be, and the first tenth of the epochs is
warm-up. A short schedule favours rates that are a little higher than the best one of the long
schedule, since it has fewer steps; near the best rate this hardly changes the accuracy.

Reference: Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", arXiv:1502.07943.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Of this many settings one is trained longer, for this many times as many epochs.
REDUCTION = 3
#: The steps below which the result of a training is noise.
FEWEST_STEPS = 10


@dataclass(frozen=True)
class Rung:
    """How many settings are trained for how many epochs."""

    count: int
    epochs: int


def rungs(trials: int, epochs: int, steps: int) -> list[Rung]:
    """The rungs for a number of settings.

    The first has a ninth of the epochs (but ten steps), or a third if there are at most three
    settings. The last has at least two settings, because one alone decides nothing.

    Args:
        trials: The number of settings.
        epochs: The epochs of the full training.
        steps: The steps of an epoch.

    Example:
        >>> from tfimm_lora.finetuning.tuning.rungs import rungs
        >>> [(rung.count, rung.epochs) for rung in rungs(9, 20, steps=40)]
        [(9, 2), (3, 7)]
        >>> [(rung.count, rung.epochs) for rung in rungs(27, 20, steps=40)]
        [(27, 2), (9, 7), (3, 20)]
        >>> [(rung.count, rung.epochs) for rung in rungs(6, 20, steps=3)]
        [(6, 4), (2, 7)]
    """
    parts = [REDUCTION**2, REDUCTION, 1]
    if trials <= REDUCTION:
        parts = parts[1:]
    found: list[Rung] = []
    count = trials
    for part in parts:
        if found and count < 2:
            break
        length = min(max(round(epochs / part), math.ceil(FEWEST_STEPS / steps)), epochs)
        if not found or length > found[-1].epochs:
            found.append(Rung(count, length))
            count = math.ceil(count / REDUCTION)
    return found
