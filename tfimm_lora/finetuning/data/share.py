"""``Share``: the part of each batch that one of several processes reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Share:
    """The part of each batch that one of several processes reads.

    A batch is divided into equal parts, one for each device of all processes. It is filled up
    to a size that can be divided: its examples are repeated, with weight 0.

    Args:
        parts: The number of devices of all processes.
        first: The index of the first device of this process.
        count: The number of its devices.
        multiple: The size of a filled batch is a multiple of it. Default: ``parts``.

    Example:
        >>> from tfimm_lora.finetuning.data.share import Share
        >>> rows, weights = Share(parts=4, first=2, count=2).of_batch(7)
        >>> rows.tolist(), [round(float(w), 3) for w in weights]
        ([4, 5, 6, 0], [1.143, 1.143, 1.143, 0.0])
    """

    parts: int
    first: int
    count: int
    multiple: int | None = None

    def places(self, size: Any, arange: Callable[[Any, Any], Any]) -> Any:
        """The places of this process in a filled batch, with ``arange`` of a framework."""
        each = size // self.parts
        return arange(self.first * each, (self.first + self.count) * each)

    def of_batch(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples that this process reads of a batch of n, and their weights.

        The weights of the filled batch have a mean of 1, so the mean of the weighted losses is
        the mean loss of the n examples.
        """
        multiple = self.multiple or self.parts
        size = -(-n // multiple) * multiple
        places = self.places(size, np.arange)
        return places % n, np.where(places < n, np.float32(size / n), np.float32(0))
