"""Combine the fully trained weights of several adapters: biases and classifiers."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.validation import TRAIN_BIAS


def combine_trained_weights(
    adapters: Sequence[Adapter], weights: Sequence[float], choice: int | str | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...], str]:
    """Return the combined weights, their modules, and which biases were trained.

    Args:
        adapters: The adapters.
        weights: One number for each adapter, for "average".
        choice: The ``trained_whole`` argument of ``combine_adapters``.
    """
    if isinstance(choice, numbers.Integral) and not isinstance(choice, bool):
        if not 0 <= choice < len(adapters):
            raise ValueError(
                f"Received trained_whole={choice} for {len(adapters)} adapters; expected an "
                f"index from 0 to {len(adapters) - 1}."
            )
        kept = adapters[int(choice)]
        return dict(kept.weights), kept.modules, kept.bias
    if choice not in (None, "average"):
        raise ValueError(
            f"Received trained_whole={choice!r}; expected None, 'average' or the index of the "
            "adapter whose weights to keep."
        )
    average = choice == "average"
    differing = _differing(adapters, by_value=not average)
    if differing:
        raise ValueError(
            f"Received adapters whose fully trained weights differ"
            f"{' in names or shapes' if average else ''}: {listed(differing)}. They cannot be "
            "summed without the base model's. Pass trained_whole=0 to keep those of the first "
            "adapter"
            + ("." if average else ", or 'average' for adapters of the same task and classes.")
        )
    first = adapters[0]
    bias = max((adapter.bias for adapter in adapters), key=TRAIN_BIAS.index)
    if not average:
        return dict(first.weights), first.modules, bias
    if not sum(weights):
        raise ValueError(
            f"Received trained_whole='average' with weights={weights!r}, whose sum is 0; "
            "expected another sum. Alternatively pass the index of an adapter."
        )
    values = {key: _mean([x.weights[key] for x in adapters], weights) for key in first.weights}
    return values, first.modules, bias


def _differing(adapters: Sequence[Adapter], by_value: bool) -> list[str]:
    """Return the names of the weights and modules that differ between adapters."""
    first, *others = adapters
    keys = different(key for adapter in adapters for key in adapter.weights)
    modules = different(name for adapter in adapters for name in adapter.modules)
    return [
        *(key for key in keys if not all(_alike(first, x, key, by_value) for x in others)),
        *(f"module {m}" for m in modules if not all(m in x.modules for x in adapters)),
    ]


def _alike(one: Adapter, other: Adapter, key: str, by_value: bool) -> bool:
    x, y = one.weights.get(key), other.weights.get(key)
    if x is None or y is None or x.shape != y.shape:
        return False
    return not by_value or (x.dtype == y.dtype and x.tobytes() == y.tobytes())


def _mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    shape, dtype = values[0].shape, values[0].dtype
    weighted = (w * value.astype("float64") for w, value in zip(weights, values))
    mean: np.ndarray = sum(weighted, np.zeros(shape)) / sum(weights)
    # Counters, as in torch's batch normalization, stay integers.
    return (np.rint(mean) if dtype.kind in "iu" else mean).astype(dtype)


def different(values: Iterable[Any]) -> list[Any]:
    """Return the values without duplicates, in order."""
    return list(dict.fromkeys(values))


def listed(values: Sequence[Any], limit: int = 10) -> str:
    """Return the first values and the number of others, for a message."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more
