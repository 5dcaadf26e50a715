"""The optimizer of the recipe: AdamW whose rate warms up and then follows a cosine."""

from __future__ import annotations

import math
from typing import Any


def create_optimizer(
    keras: Any,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> Any:
    """AdamW with linear warm-up and cosine decay to zero.

    Args:
        keras: The Keras of the model.
        steps: Number of training steps.
        learning_rate: The rate at the end of the warm-up. Default 1e-3.
        weight_decay: Decoupled weight decay; biases have none. Default 0.01.
        warmup: Share of the steps in which the rate grows from zero. Default 0.1.

    Raises:
        ValueError: for a value out of its range.

    Reference: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    arXiv:1711.05101; "SGDR", arXiv:1608.03983, equation 5.
    """
    check_number("learning_rate", learning_rate, 0, above=True)
    check_number("weight_decay", weight_decay, 0)
    check_number("warmup", warmup, 0, below=1)
    warm = round(warmup * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # The first step is a step, too: its rate is that of the second step's start.
        initial_learning_rate=learning_rate / (warm + 1) if warm else learning_rate,
        decay_steps=max(steps - warm, 1),
        warmup_target=learning_rate if warm else None,
        warmup_steps=warm,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer


def check_number(
    name: str, value: Any, least: float, above: bool = False, below: float = math.inf
) -> None:
    """Raise unless a number is at least (or above) one and below another."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not least <= value < below:
        fits = False
    else:
        fits = value > least or not above
    if not fits:
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(
            f"Received {name}={value!r}; expected a number "
            f"{'above' if above else 'of at least'} {least:g}{upper}."
        )


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise unless a value is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"Received {name}={value!r}; expected a whole number of at least {least}."
        )
