"""Whether a file gives what the model gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfimm_lora.exporting.exported import TensorInfo

#: What a model gives, by name.
Outputs = dict[str, np.ndarray]

#: Sizes of the batches that a file is run with.
BATCHES = (1, 3)

#: How many samples are run at a time to count top classes.
_AT_ONCE = 16

#: The largest difference that is taken for rounding, relative to the largest output, by format
#: and way of quantising. Keras and SavedModel run the same operations, up to the order in which
#: an update is added; TFLite and ONNX other kernels, with other orders of sums: 1e-5 was seen
#: with whole networks (ViT, ConvNeXt, MobileNetV2, EfficientNet). Weights in float16 have 11
#: bits, those in int8 one of 255 values a channel; it was 0.01 and, but for an EfficientNet of
#: random weights, 0.1.
TOLERANCES = {
    "keras": 1e-4,
    "savedmodel": 1e-4,
    "tflite": 1e-3,
    "onnx": 1e-3,
    "float16": 5e-2,
    "dynamic": 0.25,
    "int8": 0.5,
}

#: How far a model of 16 bits may be from itself in float32, before anything is written.
SIXTEEN_BIT = {"float16": 0.05, "bfloat16": 0.25}

#: The share of samples whose top class an int8 file must share with the model.
AGREEMENT = 0.9


@dataclass(frozen=True)
class Comparison:
    """What was seen when a file was run."""

    difference: float
    agreement: float | None
    outputs: tuple[TensorInfo, ...]


def relative_difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference of two dicts of arrays, relative to the largest number expected.

    Infinite where shapes differ or a number is not finite, and one of them only.

    Example:
        >>> import numpy as np
        >>> relative_difference({"y": np.array([1.0, 4.5])}, {"y": np.array([1.0, 4.0])})
        0.125
    """
    if outputs.keys() != expected.keys():
        return np.inf
    return max(_difference(outputs[name], expected[name]) for name in expected)


def _difference(y: np.ndarray, expected: np.ndarray) -> float:
    if y.shape != expected.shape:
        return np.inf
    y, expected = y.astype("float64"), expected.astype("float64")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(y)):
        return np.inf
    if not finite.any():
        return 0.0
    scale = np.abs(expected[finite]).max() or 1.0
    return float(np.abs(y - expected)[finite].max() / scale)


def batches_of(arrays: list[np.ndarray], all_of_them: bool) -> list[list[np.ndarray]]:
    """The batches that model and file are run on: one input, three, and if wanted all.

    Args:
        arrays: Inputs; repeated if there are too few.
        all_of_them: Whether there are to be batches with all inputs, too.
    """
    few = [np.resize(array, (max(BATCHES), *array.shape[1:])) for array in arrays]
    found = [[array[:n] for array in few] for n in BATCHES]
    starts = range(0, len(arrays[0]), _AT_ONCE) if all_of_them else ()
    return found + [[array[i : i + _AT_ONCE] for array in arrays] for i in starts]


def compare(outputs: list[Outputs], expected: list[Outputs]) -> Comparison:
    """Compare what a file gives with what the model gives, for the batches of ``batches_of``.

    The difference is that of the first batches, the agreement in top classes that of the
    others, if there are any and an output is one of scores, (n, classes).
    """
    few = len(BATCHES)
    differences = [relative_difference(y, e) for y, e in zip(outputs[:few], expected)]
    first, second = outputs[:few]
    infos = tuple(
        TensorInfo(name, _common(y.shape, second[name].shape), str(y.dtype))
        for name, y in first.items()
    )
    same = [_same_tops(y, e) for y, e in zip(outputs[few:], expected[few:])]
    agreement = float(np.concatenate(same).mean()) if same and same[0].size else None
    return Comparison(max(differences), agreement, infos)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(m if m == n else None for m, n in zip(one, other))


def _same_tops(outputs: Outputs, expected: Outputs) -> np.ndarray:
    """For each input whether all top classes are the same."""
    scores = [name for name, y in expected.items() if y.ndim == 2 and y.shape[1] > 1]
    tops = [outputs[name].argmax(1) == expected[name].argmax(1) for name in scores]
    return np.all(tops, axis=0) if tops else np.zeros(0)
