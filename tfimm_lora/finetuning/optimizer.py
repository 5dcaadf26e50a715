"""The default optimizer: AdamW with warm-up and cosine decay."""

from __future__ import annotations

from typing import Any

from tfimm_lora.validation import check_number


def create_optimizer(
    keras: Any,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> Any:
    """Create AdamW with linear warm-up and cosine decay to zero.

    Args:
        keras: The Keras of the model.
        steps: The number of training steps.
        learning_rate: The learning rate at the end of the warm-up. Default: 1e-3.
        weight_decay: Decoupled weight decay, not applied to biases. Default: 0.01.
        warmup: The share of the steps in which the rate grows from zero. Default: 0.1.

    Raises:
        TypeError, ValueError: for a value that is not a number or out of range.

    Reference: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    arXiv:1711.05101; "SGDR", arXiv:1608.03983, equation 5.
    """
    check_number(learning_rate, "learning_rate", 0, exclusive=True)
    check_number(weight_decay, "weight_decay", 0)
    check_number(warmup, "warmup", 0, below=1)
    warmup_steps = round(warmup * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # The warm-up starts above zero, or the first step would change nothing.
        initial_learning_rate=learning_rate / (warmup_steps + 1),
        decay_steps=max(steps - warmup_steps, 1),
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay)
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer
