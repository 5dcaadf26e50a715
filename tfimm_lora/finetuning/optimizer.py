"""The default optimizer: AdamW with warm-up and cosine decay."""

from __future__ import annotations

import math
from typing import Any

from tfimm_lora.validation import check_number

#: The rate at which LoRA trains best, ten times that of full fine-tuning; see
#: docs/explanation/study.md.
LEARNING_RATE = 3e-3
#: The default of ``clip_norm``, as in the Trainer of transformers.
CLIP_NORM = 1.0


def create_optimizer(
    keras: Any,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip_norm: float = CLIP_NORM,
) -> Any:
    """Create AdamW with linear warm-up, cosine decay to zero and gradient clipping.

    Args:
        keras: The Keras of the model.
        steps: The number of training steps.
        learning_rate: The learning rate at the end of the warm-up. Default: 3e-3.
        weight_decay: Decoupled weight decay, not applied to biases. Default: 0.01.
        warmup: The share of the steps in which the rate grows from zero. Default: 0.1.
        clip_norm: The largest norm of the gradient, over all trained weights together; a larger
            gradient is scaled down to it. Default: 1. 0 means no clipping. Without it, a few
            steps with large gradients can ruin a pretrained model for good, at rates at which
            LoRA trains best.

    Raises:
        TypeError, ValueError: for a value that is not a number or out of range.

    Reference: Loshchilov & Hutter, "Decoupled Weight Decay Regularization",
    arXiv:1711.05101; "SGDR", arXiv:1608.03983, equation 5. Clipping: Pascanu et al., "On the
    difficulty of training recurrent neural networks", arXiv:1211.5063.
    """
    check_number(learning_rate, "learning_rate", 0, exclusive=True)
    check_number(warmup, "warmup", 0, below=1)
    warmup_steps = round(warmup * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # The warm-up starts above zero, or the first step would change nothing.
        initial_learning_rate=learning_rate / (warmup_steps + 1),
        decay_steps=max(steps - warmup_steps, 1),
        warmup_target=learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
    return create_adamw(keras, schedule, weight_decay, clip_norm)


def rate_of_step(step: int, steps: int, learning_rate: float, warmup: float) -> float:
    """The rate of a step, from 0, in the schedule of ``create_optimizer``.

    Example:
        >>> from tfimm_lora.finetuning.optimizer import rate_of_step
        >>> [round(rate_of_step(i, 10, 1.0, 0.2), 3) for i in (0, 1, 2, 6, 9)]
        [0.333, 0.667, 1.0, 0.5, 0.038]
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return learning_rate * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def create_adamw(keras: Any, learning_rate: Any, weight_decay: float, clip_norm: float) -> Any:
    """Create the AdamW of ``create_optimizer`` with a rate or a schedule."""
    check_number(weight_decay, "weight_decay", 0)
    check_number(clip_norm, "clip_norm", 0)
    optimizer = keras.optimizers.AdamW(
        learning_rate, weight_decay=weight_decay, global_clipnorm=clip_norm or None
    )
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer
