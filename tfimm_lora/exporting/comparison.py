"""Comparison of the outputs of an exported file with those of the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tfimm_lora.exporting.exported import TensorInfo

#: The outputs of a model by name.
Outputs = dict[str, np.ndarray]

#: The batch sizes that a file is run with.
BATCHES = (1, 3)

#: The batch size for comparing the top classes of samples.
_SAMPLE_BATCH = 16

#: The largest allowed difference, relative to the largest output, by format or quantization.
#: Keras and SavedModel run the same operations, apart from the order in which an update is
#: added. TFLite and ONNX have other kernels, with another order of summation; the differences
#: measured with ViT, ConvNeXt, MobileNetV2 and EfficientNet were 1e-5. With weights in float16
#: (11 bits) they were 0.01, with weights in int8 (255 values per channel) 0.1, and larger only
#: for an EfficientNet with random weights.
TOLERANCES = {
    "keras": 1e-4,
    "savedmodel": 1e-4,
    "tflite": 1e-3,
    "onnx": 1e-3,
    "float16": 5e-2,
    "dynamic": 0.25,
    "int8": 0.5,
}

#: The largest allowed difference between a 16-bit model and its copy in float32.
SIXTEEN_BIT = {"float16": 0.05, "bfloat16": 0.25}

#: The share of samples for which an int8 file must have the same top class as the model.
AGREEMENT = 0.9


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        difference: The largest difference, relative to the largest output.
        agreement: The share of samples with the same top class; None without samples.
        outputs: The names, shapes and dtypes of the outputs of the file.
    """

    difference: float
    agreement: float | None
    outputs: tuple[TensorInfo, ...]


def relative_difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference of two dicts of arrays, relative to the largest expected value.

    It is infinite if shapes differ, or if a value is finite in only one of the two.

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


def batches_of(arrays: list[np.ndarray], all_samples: bool) -> list[list[np.ndarray]]:
    """The batches that the model and the file are run on: one for each size in ``BATCHES``.

    Args:
        arrays: The inputs, repeated if there are too few.
        all_samples: Whether to add batches that together contain all inputs.
    """
    few = [np.resize(array, (max(BATCHES), *array.shape[1:])) for array in arrays]
    batches = [[array[:n] for array in few] for n in BATCHES]
    starts = range(0, len(arrays[0]), _SAMPLE_BATCH) if all_samples else ()
    return batches + [[array[i : i + _SAMPLE_BATCH] for array in arrays] for i in starts]


def compare(
    outputs: list[Outputs], expected: list[Outputs], *, has_classes: bool = True
) -> Comparison:
    """Compare the outputs of a file with those of the model, for the batches of ``batches_of``.

    The difference is computed from the first batches. The agreement of top classes is computed
    from the others, if there are any and an output has the shape (n, classes).

    Args:
        outputs, expected: The outputs for each batch.
        has_classes: Whether the largest output is the answer of the model.
    """
    few = len(BATCHES)
    differences = [relative_difference(y, e) for y, e in zip(outputs[:few], expected)]
    first, second = outputs[:few]
    infos = tuple(
        TensorInfo(name, _common(y.shape, second[name].shape), str(y.dtype))
        for name, y in first.items()
    )
    others = zip(outputs[few:], expected[few:]) if has_classes else ()
    same = [_same_top_class(y, e) for y, e in others]
    agreement = float(np.concatenate(same).mean()) if same and same[0].size else None
    return Comparison(max(differences), agreement, infos)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(m if m == n else None for m, n in zip(one, other))


def _same_top_class(outputs: Outputs, expected: Outputs) -> np.ndarray:
    """Whether the top classes of all outputs are the same, for each input."""
    scores = [name for name, y in expected.items() if y.ndim == 2 and y.shape[1] > 1]
    same = [outputs[name].argmax(1) == expected[name].argmax(1) for name in scores]
    return np.all(same, axis=0) if same else np.zeros(0)
