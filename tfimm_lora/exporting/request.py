"""``ExportRequest``: the arguments of an export, checked before anything is written."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfimm_lora.backend import backend_of, how_to_use_tensorflow
from tfimm_lora.exporting.exported import description_path
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.validation import check_choice, check_number

#: The formats, and the suffixes of their files.
FORMATS = {"keras": ".keras", "savedmodel": "", "tflite": ".tflite", "onnx": ".onnx"}
QUANTIZE = ("float16", "dynamic", "int8")

#: 18 is the newest opset that tf2onnx 1.17 is tested with. 17 has all operators of image models
#: and is supported by onnxruntime 1.12 (2022) and newer.
OPSET = 17
OPSETS = range(13, 19)

#: The most bytes of weights in a TFLite or ONNX file, a single flatbuffer or protobuf message.
_MOST_BYTES = 2**31 - 2**24


@dataclass(frozen=True)
class ExportRequest:
    """The checked arguments of an export.

    Attributes:
        path: The absolute path of the file.
        format: A name in ``FORMATS``.
        quantize: A name in ``QUANTIZE``, or None.
        opset: The ONNX operator set.
        tolerance: The tolerance, or None for the default.
    """

    path: Path
    format: str
    quantize: str | None
    opset: int
    tolerance: float | None

    @property
    def kind(self) -> str:
        """The quantization or, without one, the format. The default tolerance depends on it."""
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
) -> ExportRequest:
    """Check the arguments of ``export``.

    Raises:
        TypeError: if ``tolerance`` is not a number.
        ValueError: for an unknown format, an option that the format does not have, or a model
            whose framework or size the format does not support.
        OSError: for a path that cannot be written.
        ImportError: if a package is missing.
    """
    path = Path(os.path.abspath(path))
    format = format_of(path, format)
    if quantize is not None:
        check_choice(quantize, "quantize", QUANTIZE)
    for name, value, owner in (("quantize", quantize, "tflite"), ("opset", opset, "onnx")):
        if value is not None and format != owner:
            raise ValueError(
                f"Received {name}={value!r} for the format {format!r}; expected None. Only the "
                f"format {owner!r} has this option."
            )
    if has_samples != (quantize == "int8"):
        raise ValueError(
            f"Received quantize={quantize!r} {'with' if has_samples else 'without'} samples; "
            "expected samples for 'int8' only. Pass a few hundred typical inputs, from which "
            "the ranges of the activations are measured."
        )
    if include_preprocessing and format == "keras":
        raise ValueError(
            "Received include_preprocessing=True for the format 'keras'; expected False. A "
            "Keras file contains only the model. The preprocessing is in the JSON file beside "
            "it. For a single file that takes pictures, export to SavedModel, TFLite or ONNX."
        )
    if opset is not None and opset not in OPSETS:
        raise ValueError(
            f"Received opset={opset!r}; expected {OPSETS[0]} to {OPSETS[-1]}, which tf2onnx "
            f"supports. Leave it out for {OPSET}."
        )
    if tolerance not in (None, math.inf):  # infinity accepts every difference
        check_number(tolerance, "tolerance", 0, exclusive=True)
    check_path(path, format, overwrite)
    _check_framework(model, format)
    _check_size(model, format, quantize)
    if format == "onnx":
        for module in ("tf2onnx", "onnxruntime"):
            require(module, extra="onnx", why="Export to ONNX")
    return ExportRequest(path, format, quantize, opset or OPSET, tolerance)


def format_of(path: Path, format: str | None) -> str:
    """The format of a file: as given, or by the suffix of its path.

    Raises:
        ValueError: if the format is unknown or does not match the suffix.
    """
    if format is not None:
        check_choice(format, "format", FORMATS)
    by_suffix = {suffix: name for name, suffix in FORMATS.items()}.get(path.suffix.lower())
    if format is None:
        if by_suffix is None:
            raise ValueError(
                f"Received the path {path.name!r} without a format; expected the suffix "
                ".keras, .tflite or .onnx, or none for the folder of a SavedModel. Or pass "
                f"format=, one of {', '.join(FORMATS)}."
            )
        return by_suffix
    is_other = by_suffix not in (None, format, "savedmodel")
    if is_other or (format == "keras" and by_suffix != "keras"):
        suffix = f"the suffix {FORMATS[format]}" if FORMATS[format] else "no suffix"
        raise ValueError(
            f"Received the path {path.name!r} for the format {format!r}; expected a name with "
            f"{suffix}."
        )
    return format


def check_path(path: Path, format: str, overwrite: bool) -> None:
    """Raise an OSError unless a file of this format may be written to ``path``."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Received the path {path}; expected an existing folder {path.parent}. Create it "
            "first."
        )
    if path.is_dir() and format != "savedmodel":
        raise IsADirectoryError(
            f"Received the path {path}, which is a folder; expected the name of a file."
        )
    if path.is_dir() and any(path.iterdir()) and not (path / "saved_model.pb").is_file():
        raise IsADirectoryError(
            f"Received the path {path}, a folder that is not a SavedModel; expected a new "
            "name. Folders with other content are never replaced."
        )
    if format == "savedmodel" and path.is_file():
        raise FileExistsError(
            f"Received the path {path}, which is a file; expected a new name. A SavedModel is "
            "a folder."
        )
    if description_path(path).is_dir():
        raise IsADirectoryError(
            f"Received the path {path}, whose description would be written to "
            f"{description_path(path)}, which is a folder; expected another path."
        )
    for output in (path, description_path(path)):
        empty = output.is_dir() and not any(output.iterdir())
        if (output.exists() or output.is_symlink()) and not empty and not overwrite:
            raise FileExistsError(
                f"{output} already exists; expected a new name. Pass overwrite=True to replace "
                "it."
            )


def _check_framework(model: Any, format: str) -> None:
    framework = backend_of(model).framework()
    if format != "keras" and framework != "tensorflow":
        raise ValueError(
            f"Received the format {format!r} for a model of Keras 3 on {framework}; expected "
            "'keras'. The other formats need TensorFlow. "
            f"{how_to_use_tensorflow()}, in a process that loads and exports a .keras file "
            "which was exported here."
        )


def _check_size(model: Any, format: str, quantize: str | None) -> None:
    if format not in ("tflite", "onnx") or quantize is not None:
        return
    count = sum(math.prod(int(size) for size in weight.shape) for weight in model.weights)
    if 4 * count > _MOST_BYTES:
        raise ValueError(
            f"Received the format {format!r} for a model of {4 * count / 2**30:.1f} GiB; "
            "expected less than 2 GiB, the limit of the format. Export to a SavedModel."
        )
