"""Pictures as inputs: preprocessing as part of a file, and what is checked with."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tfimm_lora.exporting.exported import TensorInfo
from tfimm_lora.exporting.serving import PICTURES, Inputs
from tfimm_lora.zoo.weights.preprocessing import create_preprocessing

_FIELDS = ("input_size", "mean", "std", "in_channels", "interpolation", "crop_pct")


def preprocessing_values(preprocessing: Any, model: Any) -> dict[str, Any] | None:
    """Preprocessing as plain values for JSON, or None if there is none.

    Args:
        preprocessing: A value with ``to_dict`` (as that of a run), a mapping, anything with
            mean, std and input_size (as a config of tfimm), or None for the model's own.
        model: Asked for its config if ``preprocessing`` is None.

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
            f"Received preprocessing={preprocessing!r}, which has no "
            f"{' and no '.join(missing)}; expected a Preprocessing, a config of tfimm, or a "
            'mapping such as {"input_size": (224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}.'
        )
    return {
        name: list(value) if isinstance(value, (tuple, list)) else value
        for name, value in values.items()
        if value is not None
    }


def preprocessing_function(values: Mapping[str, Any]) -> Callable[[Any], Any]:
    """From pictures in 0..255, of the input size, to the input of a model.

    Args:
        values: As ``preprocessing_values`` gives them.
    """
    channels = values.get("in_channels") or len(values["mean"])
    cfg = types.SimpleNamespace(mean=values["mean"], std=values["std"], in_channels=channels)
    prepare = create_preprocessing(cfg, dtype="float32")
    if values.get("channel_order", "rgb") == "rgb":
        return prepare
    return lambda pictures: prepare(pictures[..., ::-1])


def pictures_in_place_of(inputs: Inputs, values: Mapping[str, Any] | None) -> Inputs:
    """The inputs of a file that does the preprocessing itself.

    Raises:
        ValueError: if the preprocessing is unknown, or the model does not take one batch of
            pictures of that many channels.
    """
    if values is None:
        raise ValueError(
            "Received include_preprocessing=True for a model whose preprocessing is unknown. "
            "Pass preprocessing=, with mean and std for pictures in 0..1."
        )
    channels = values.get("in_channels") or len(values["mean"])
    shapes = [t.shape for t in inputs.tensors]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][-1] not in (None, channels):
        raise ValueError(
            f"Received include_preprocessing=True for a model of inputs of shape "
            f"{', '.join(map(str, shapes))}; expected pictures, (batch, height, width, "
            f"{channels})."
        )
    pictures = dataclasses.replace(inputs.tensors[0], name=PICTURES, dtype="float32")
    return Inputs((pictures,), inputs.structure)


def seeded_arrays(inputs: Inputs, values: Mapping[str, Any] | None, n: int) -> list[np.ndarray]:
    """Inputs to compare with, the same every time.

    Pictures are patches of colours with noise: unlike noise alone, no two of them look the
    same to a model that takes means over all positions. They go through the preprocessing, if
    it is known. Other numbers are normal ones, or 0 and 1.

    Args:
        inputs: What the file takes.
        values: The preprocessing, or None.
        n: Size of the batch.
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
                array = preprocessing_function(values)(array).numpy()
        arrays.append(array.astype(tensor.dtype))
    return arrays


def _with_sizes(shape: tuple[int | None, ...], sides: tuple[int, int]) -> list[int]:
    """A shape with numbers for what may be any size; those of pictures are their sides."""
    anything = [*sides, 3] if len(shape) == 3 else [8] * len(shape)
    return [size or other for size, other in zip(shape, anything)]


def _patches(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    n, height, width, channels = shape
    rows, columns = min(4, height), min(4, width)
    few = rng.normal(size=(n, rows, columns, channels))
    row: np.ndarray = np.arange(height) * rows // height
    column: np.ndarray = np.arange(width) * columns // width
    return few[:, row][:, :, column]


def given_arrays(given: Any, inputs: Inputs, name: str) -> list[np.ndarray]:
    """Arrays of the caller's, in the order and of the types of the inputs.

    Raises:
        ValueError: if they are not what the file takes; ``name`` says which argument.
    """
    import tensorflow as tf

    arrays = [np.asarray(array) for array in tf.nest.flatten(given)]
    wanted = ", ".join(str(t.shape) for t in inputs.tensors)
    shapes = ", ".join(str(a.shape) for a in arrays) or "nothing"
    if len(arrays) != len(inputs.tensors) or not all(map(_fits, arrays, inputs.tensors)):
        raise ValueError(
            f"Received {name} of shape {shapes}; expected {wanted}, at least one, as the file "
            "takes them."
        )
    arrays = [a.astype(t.dtype) for a, t in zip(arrays, inputs.tensors)]
    if not all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f"):
        raise ValueError(f"Received {name} with numbers that are not finite; expected others.")
    return arrays


def _fits(array: np.ndarray, tensor: TensorInfo) -> bool:
    same = [size in (None, n) for size, n in zip(tensor.shape, array.shape)]
    return array.ndim == len(tensor.shape) and all(same) and len(array) > 0


def sample_array(samples: Any, inputs: Inputs) -> np.ndarray:
    """Samples for quantisation as one array: of arrays, lists, datasets with labels or not.

    Raises:
        ValueError: if they are not what the file takes, or there are none.
    """
    if len(inputs.tensors) != 1:
        raise ValueError(
            f"Received quantize='int8' for a model of {len(inputs.tensors)} inputs; "
            "expected one."
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
                "at least one, all of one shape."
            )
        samples = np.concatenate(batches)
    return given_arrays(samples, inputs, "samples")[0]
