"""Pictures as inputs of an exported file: preprocessing, test inputs and samples."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tfimm_lora.exporting.exported import TensorInfo
from tfimm_lora.exporting.serving import PICTURES, Inputs
from tfimm_lora.utils.nested import flatten
from tfimm_lora.zoo.weights.preprocessing import create_preprocessing

_FIELDS = ("input_size", "mean", "std", "in_channels", "interpolation", "crop_pct")


def preprocessing_values(preprocessing: Any, model: Any) -> dict[str, Any] | None:
    """The preprocessing as plain values for JSON, or None if it is unknown.

    Args:
        preprocessing: An object with ``to_dict`` (such as the preprocessing of a run), a
            mapping, an object with mean, std and input_size (such as a tfimm config), or None
            for the config of the model.
        model: The model.

    Raises:
        TypeError: for anything else.
    """
    if preprocessing is None:
        preprocessing = getattr(model, "cfg", None)
        if not all(hasattr(preprocessing, name) for name in ("mean", "std")):
            return None
    if isinstance(preprocessing, Mapping):
        values = dict(preprocessing)
    elif hasattr(preprocessing, "to_dict"):
        values = dict(preprocessing.to_dict())
    else:
        values = {name: getattr(preprocessing, name, None) for name in _FIELDS}
    missing = [name for name in ("mean", "std") if values.get(name) is None]
    if missing:
        raise TypeError(
            f"Received preprocessing={preprocessing!r} without {' and '.join(missing)}; "
            "expected a Preprocessing, a tfimm config, or a mapping such as "
            '{"input_size": (224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}.'
        )
    return {
        name: list(value) if isinstance(value, (tuple, list)) else value
        for name, value in values.items()
        if value is not None
    }


def preprocessing_function(values: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function from pictures in [0, 255], of the input size, to the input of a model.

    Args:
        values: The result of ``preprocessing_values``.
    """
    channels = values.get("in_channels") or len(values["mean"])
    cfg = types.SimpleNamespace(mean=values["mean"], std=values["std"], in_channels=channels)
    prepare = create_preprocessing(cfg, dtype="float32")
    if values.get("channel_order", "rgb") == "rgb":
        return prepare
    return lambda pictures: prepare(pictures[..., ::-1])


def picture_inputs(inputs: Inputs, values: Mapping[str, Any] | None) -> Inputs:
    """The inputs of a file that includes the preprocessing.

    Raises:
        ValueError: if the preprocessing is unknown, or the input of the model is not one batch
            of pictures with this number of channels.
    """
    if values is None:
        raise ValueError(
            "Received include_preprocessing=True for a model whose preprocessing is unknown. "
            "Pass preprocessing=, with mean and std for pictures in [0, 1]."
        )
    channels = values.get("in_channels") or len(values["mean"])
    shapes = [t.shape for t in inputs.tensors]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] not in (None, channels):
        raise ValueError(
            "Received include_preprocessing=True for a model with inputs of shape "
            f"{', '.join(map(str, shapes))}; expected pictures, (batch, height, width, "
            f"{channels}). Leave include_preprocessing out."
        )
    pictures = dataclasses.replace(inputs.tensors[0], name=PICTURES, dtype="float32")
    return Inputs((pictures,), inputs.structure)


def seeded_arrays(inputs: Inputs, values: Mapping[str, Any] | None, n: int) -> list[np.ndarray]:
    """Seeded inputs to compare on.

    Pictures consist of coloured patches with noise. Pure noise would not do: after pooling
    over all positions, two pictures of noise look the same to a model. The preprocessing is
    applied if it is known. Other float inputs are normally distributed; integers are 0 or 1.

    Args:
        inputs: The inputs of the file.
        values: The preprocessing, or None.
        n: The batch size.
    """
    rng = np.random.default_rng(0)
    is_prepared = inputs.tensors[0].name != PICTURES
    arrays = []
    for tensor in inputs.tensors:
        kind = np.dtype(tensor.dtype).kind
        sides = (values or {}).get("input_size") or (64, 64)
        shape = (n, *_with_sizes(tensor.shape[1:], sides))
        if kind != "f":
            arrays.append(rng.integers(0, 2, shape).astype(tensor.dtype))
            continue
        array = rng.normal(size=shape)
        if len(shape) == 4:
            array = 0.25 * array + _patches(rng, shape)
            if not is_prepared or values is not None:
                array = np.clip(128 + 60 * array, 0, 255).round()
            if is_prepared and values is not None:
                array = np.asarray(preprocessing_function(values)(array))
        arrays.append(array.astype(tensor.dtype))
    return arrays


def _with_sizes(shape: tuple[int | None, ...], sides: tuple[int, int]) -> list[int]:
    """The shape with sizes filled in where it is None."""
    defaults = [*sides, 3] if len(shape) == 3 else [8] * len(shape)
    return [size or default for size, default in zip(shape, defaults)]


def _patches(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    n, height, width, channels = shape
    rows, columns = min(4, height), min(4, width)
    few = rng.normal(size=(n, rows, columns, channels))
    row: np.ndarray = np.arange(height) * rows // height
    column: np.ndarray = np.arange(width) * columns // width
    return few[:, row][:, :, column]


def given_arrays(given: Any, inputs: Inputs, name: str) -> list[np.ndarray]:
    """The arrays of the caller, in the order and with the dtypes of the inputs.

    Args:
        given: The arrays, in any structure of dicts, lists and tuples.
        inputs: The inputs of the file.
        name: The name of the argument, for error messages.

    Raises:
        ValueError: if the arrays do not fit the inputs or are not finite.
    """
    arrays = [np.asarray(array) for array in flatten(given)]
    expected = ", ".join(str(t.shape) for t in inputs.tensors)
    shapes = ", ".join(str(a.shape) for a in arrays) or "nothing"
    if len(arrays) != len(inputs.tensors) or not all(map(_fits, arrays, inputs.tensors)):
        raise ValueError(
            f"Received {name} of shape {shapes}; expected at least one input of the file, of "
            f"shape {expected}."
        )
    arrays = [a.astype(t.dtype) for a, t in zip(arrays, inputs.tensors)]
    if not all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f"):
        raise ValueError(
            f"Received {name} with NaN or infinite values; expected finite values only."
        )
    return arrays


def _fits(array: np.ndarray, tensor: TensorInfo) -> bool:
    same = [size in (None, n) for size, n in zip(tensor.shape, array.shape)]
    return array.ndim == len(tensor.shape) and all(same) and len(array) > 0


def sample_array(samples: Any, inputs: Inputs) -> np.ndarray:
    """The samples for quantization as one array.

    Args:
        samples: An array, or an iterable of inputs or batches, with labels or without.
        inputs: The inputs of the file.

    Raises:
        ValueError: if they do not fit the inputs, or there are none.
    """
    if len(inputs.tensors) != 1:
        raise ValueError(
            f"Received quantize='int8' for a model with {len(inputs.tensors)} inputs; "
            "expected a model with one input."
        )
    if not hasattr(samples, "shape") and isinstance(samples, Iterable):
        rank = len(inputs.tensors[0].shape)
        items = [item[0] if isinstance(item, tuple) else item for item in samples]
        arrays = [np.asarray(item) for item in items]
        batches = [a if a.ndim == rank else a[None] for a in arrays]
        shapes = sorted({a.shape[1:] for a in batches})
        if len(shapes) != 1:
            raise ValueError(
                f"Received samples of shapes {', '.join(map(str, shapes)) or 'none'}; expected "
                "at least one sample, all of the same shape."
            )
        samples = np.concatenate(batches)
    return given_arrays(samples, inputs, "samples")[0]
