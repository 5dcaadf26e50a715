"""``is_minimized``: whether a metric is better when it is lower."""

from __future__ import annotations

import re

_MINIMIZED = re.compile("loss|error|mae|mse|mape|msle|crossentropy|divergence")


def is_minimized(monitor: str) -> bool:
    """Whether a metric is better when it is lower, by its name in the logs of Keras.

    Example:
        >>> from tfimm_lora.finetuning.monitor import is_minimized
        >>> [is_minimized(name) for name in ("val_loss", "val_mae", "val_accuracy", "pr_auc")]
        [True, True, False, False]
    """
    return _MINIMIZED.search(monitor) is not None
