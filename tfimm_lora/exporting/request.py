"""What was asked for: checked before anything is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.exporting.exported import description_path
from tfimm_lora.layer_paths import nearest
from tfimm_lora.utils.optional_imports import require

#: Formats, and how the names of their files end.
FORMATS = {"keras": ".keras", "savedmodel": "", "tflite": ".tflite", "onnx": ".onnx"}
QUANTIZE = ("float16", "dynamic", "int8")

#: The newest opset that tf2onnx 1.17 is tested with is 18. 17 has all that image models need,
#: and is read by onnxruntime from 1.12 (2022) on.
OPSET = 17
OPSETS = range(13, 19)

#: Both formats put all weights into one message of protobuf or flatbuffers.
_LARGEST = 2**31 - 2**24


@dataclass(frozen=True)
class Request:
    """A checked request."""

    path: Path
    format: str
    quantize: str | None
    opset: int
    tolerance: float | None

    @property
    def kind(self) -> str:
        """The way of quantising, or else the format: what a tolerance depends on."""
        return self.quantize or self.format


def checked_request(
    model: Any,
    path: str | os.PathLike[str],
    format: str | None,
    *,
    quantize: str | None,
    has_samples: bool,
    include_preprocessing: bool,
    opset: int | None,
    tolerance: float | None,
    overwrite: bool,
) -> Request:
    """The request as a value.

    Raises:
        ValueError: for an unknown format, for options that the format does not have, for a
            backend or a size that it cannot be made from.
        OSError: for a path that cannot be written.
        ImportError: if a package is missing.
    """
    path = Path(os.path.abspath(path))
    format = format_of(path, format)
    if quantize is not None and quantize not in QUANTIZE:
        raise ValueError(
            f"Received quantize={quantize!r}; expected None or one of "
            f"{', '.join(map(repr, nearest([str(quantize)], list(QUANTIZE))))}."
        )
    for name, value, owner in (("quantize", quantize, "tflite"), ("opset", opset, "onnx")):
        if value is not None and format != owner:
            raise ValueError(
                f"Received {name}={value!r} for the format {format!r}; expected None, since "
                f"only {owner!r} has it."
            )
    if has_samples != (quantize == "int8"):
        raise ValueError(
            f"Received quantize={quantize!r} {'with' if has_samples else 'without'} samples; "
            "expected samples for 'int8', which shows the ranges of activations, and only "
            "there: some hundred typical inputs."
        )
    if include_preprocessing and format == "keras":
        raise ValueError(
            "Received include_preprocessing=True for the format 'keras'; expected False, since "
            "a Keras file holds the model that it was made from, to be trained on or built "
            "upon. The preprocessing is in the JSON file beside it. For one file that takes "
            "pictures export to a SavedModel, TFLite or ONNX."
        )
    if opset is not None and opset not in OPSETS:
        raise ValueError(
            f"Received opset={opset!r}; expected {OPSETS[0]} to {OPSETS[-1]}, which tf2onnx "
            f"can write. Leave it out for {OPSET}."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            f"Received tolerance={tolerance!r}; expected a number above 0, the largest "
            "difference from the model's outputs relative to the largest output."
        )
    check_place(path, format, overwrite)
    _check_backend(model, format)
    _check_size(model, format, quantize)
    if format == "onnx":
        for module in ("tf2onnx", "onnxruntime"):
            require(module, extra="onnx", why="Export to ONNX")
    return Request(path, format, quantize, opset or OPSET, tolerance)


def format_of(path: Path, format: str | None) -> str:
    """The format that is meant.

    Raises:
        ValueError: if it is unknown, or its files end in something else than ``path``.
    """
    of_suffix = {suffix: name for name, suffix in FORMATS.items()}
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"Received format={format!r}; expected one of "
            f"{', '.join(map(repr, nearest([str(format)], list(FORMATS))))}."
        )
    meant = of_suffix.get(path.suffix.lower())
    if format is None:
        if meant is None:
            raise ValueError(
                f"Received the path {path.name!r} without a format; expected one that ends in "
                ".keras, .tflite or .onnx, or in nothing for the folder of a SavedModel. Or "
                f"pass format=, one of {', '.join(map(repr, FORMATS))}."
            )
        return meant
    of_another = meant not in (None, format, "savedmodel")
    if of_another or (format == "keras" and meant != "keras"):
        raise ValueError(
            f"Received the path {path.name!r} for the format {format!r}; expected a name that "
            f"ends in {FORMATS[format] or 'no suffix'!r}."
        )
    return format


def check_place(path: Path, format: str, overwrite: bool) -> None:
    """Raise an OSError unless a file of a format may be written to a path."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Received the path {path}, whose folder {path.parent} does not exist; expected "
            "one that does. Make it first."
        )
    if path.is_dir() and any(path.iterdir()):
        if format != "savedmodel" or not (path / "saved_model.pb").is_file():
            raise IsADirectoryError(
                f"Received the path {path}, which is a folder and not of a SavedModel; "
                "expected a new name. A folder with other things in it is never replaced."
            )
    elif path.is_dir() and format != "savedmodel":
        raise IsADirectoryError(
            f"Received the path {path}, which is a folder; expected a file."
        )
    elif format == "savedmodel" and path.is_file():
        raise FileExistsError(
            f"Received the path {path}, which is a file; expected a new name, since a "
            "SavedModel is a folder."
        )
    if description_path(path).is_dir():
        raise IsADirectoryError(
            f"{description_path(path)} is a folder, where the description of {path.name} is to "
            "be; expected another path."
        )
    for there in (path, description_path(path)):
        empty = there.is_dir() and not any(there.iterdir())
        if (there.exists() or there.is_symlink()) and not empty and not overwrite:
            raise FileExistsError(
                f"{there} is there already; expected a new name. Pass overwrite=True to "
                "replace it."
            )


def _check_backend(model: Any, format: str) -> None:
    framework = backend_of(model).framework()
    if format != "keras" and framework != "tensorflow":
        raise ValueError(
            f"Received the format {format!r} for a model of Keras 3 on {framework}; expected "
            "'keras', the format that every backend can write. For the others export to "
            "model.keras, and in a process with KERAS_BACKEND=tensorflow load that file and "
            "export it."
        )


def _check_size(model: Any, format: str, quantize: str | None) -> None:
    if format not in ("tflite", "onnx") or quantize is not None:
        return
    numbers = sum(_count(weight.shape) for weight in model.weights)
    if 4 * numbers > _LARGEST:
        raise ValueError(
            f"Received the format {format!r} for a model of {4 * numbers / 2**30:.1f} GiB; "
            "expected one below 2 GiB, the most that one such file holds. Export to a "
            "SavedModel."
        )


def _count(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
