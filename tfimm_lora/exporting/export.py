"""``export``: write a model to a file for production and verify the file."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import installed
from tfimm_lora.bank.bank import AdapterBank
from tfimm_lora.exporting import comparison
from tfimm_lora.exporting.bank import export_bank
from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.exporting.description import describe
from tfimm_lora.exporting.export_plan import ExportPlan
from tfimm_lora.exporting.exported import Exported, description_path, size_of
from tfimm_lora.exporting.opening import opening
from tfimm_lora.exporting.output_kind import (
    LOGITS,
    PROBABILITY,
    activated,
    check_probabilities,
    kind_of,
)
from tfimm_lora.exporting.pictures import sample_array
from tfimm_lora.exporting.plain_model import ordinary_model, sixteen_bit_type
from tfimm_lora.exporting.request import ExportRequest, checked_request
from tfimm_lora.exporting.runners import runner_of
from tfimm_lora.model.output_activation import output_activation, without_output_activation
from tfimm_lora.model.output_scale import absorb_scale, standardised
from tfimm_lora.utils.atomic_files import move_into_place, temporary_path
from tfimm_lora.validation import check_bool


def export(
    model: Any,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Any = None,
    include_preprocessing: bool = False,
    quantize: str | None = None,
    samples: Any = None,
    tolerance: float | None = None,
    check_inputs: Any = None,
    opset: int | None = None,
    overwrite: bool = False,
    probabilities: bool | None = None,
) -> Exported:
    """Export a model to a file that does not need this package, and verify the file.

    LoRA updates are merged in a copy; the model itself does not change. All formats take a
    batch of any size. A model that computes in 16 bits is exported in float32. The file of a
    regression returns numbers in the units of its targets. The result and the description tell
    whether a file returns logits, probabilities or numbers.

    The file is run on seeded inputs, in batches of one and three. If its outputs differ from
    those of the model, an error is raised and nothing is written to ``path``. The JSON file
    ``<name>.json`` beside the file describes its inputs and outputs, labels and preprocessing.

    Args:
        model: A built model of either Keras, with LoRA (merged or not) or without.
        path: The file, or the folder of a SavedModel. Its parent folder must exist.
        format: "keras" (ordinary layers; a tfimm model needs tfimm and tf-keras to load),
            "savedmodel" (needs TensorFlow only), "tflite", or "onnx" (the export needs tf2onnx
            and onnxruntime). All formats except "keras" need a model on TensorFlow. Default: by
            the suffix of the path, .keras, .tflite, .onnx or none.
        labels: The names of the classes, in the order of the outputs.
        preprocessing: How pictures become inputs: the preprocessing of a run, or an object with
            mean, std and input_size. Default: the config of a tfimm model, else none.
        include_preprocessing: Whether to add the preprocessing to the file. It then takes RGB
            pictures in [0, 255], as float32, of the input size. Not for "keras".
        quantize: For "tflite": "float16" (weights take half of the bytes), "dynamic" (weights
            in int8, a quarter of the bytes) or "int8" (weights and activations in int8, for
            processors without floating point; inputs and outputs stay float32). int8 is suited
            to convolutional networks; attention and layer normalization lose much accuracy,
            which the comparison detects.
        samples: For "int8": a few hundred typical inputs of the file, as an array, a list or a
            ``tf.data.Dataset``.
        tolerance: The largest allowed difference between the outputs of the file and of the
            model, relative to the largest output. Default: 1e-4 for "keras" and "savedmodel",
            1e-3 for "tflite" and "onnx", 0.05 for "float16", 0.25 for "dynamic", 0.5 for
            "int8". For "int8", nine of ten samples must also have the same top class.
        check_inputs: The inputs of the file to compare on. Default: ``samples``, or seeded
            pictures to which the preprocessing was applied.
        opset: For "onnx": the operator set version, 13 to 18. Default: 17.
        overwrite: Whether to replace an existing file at ``path``.
        probabilities: Whether the file returns probabilities (True) or logits (False). A
            softmax (a sigmoid, if the model was fine-tuned for several labels) is added to a
            model that returns logits; the softmax or sigmoid at the end of a model is removed.
            Default: what the model returns.

    Returns:
        An ``Exported`` with the properties of the file and the measured difference.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for invalid arguments, a model that the format cannot represent, or a file
            whose outputs differ from those of the model.
        OSError: if ``path`` exists, or its parent folder does not.
        ImportError: if a package is missing.

    Example:
        >>> import tempfile, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> path = tempfile.mkdtemp() + "/model.keras"
        >>> exported = lora.export(model, path, labels=["a", "b", "c"])
        >>> exported.format, exported.difference < 1e-4, exported.description.name
        ('keras', True, 'model.keras.json')
        >>> exported.returns
        'logits'
    """
    if isinstance(model, AdapterBank):
        unused = {
            "labels": labels,
            "quantize": quantize,
            "samples": samples,
            "probabilities": probabilities,
        }
        return _export_bank(
            model,
            unused,
            path,
            format,
            preprocessing=preprocessing,
            include_preprocessing=include_preprocessing,
            tolerance=tolerance,
            check_inputs=check_inputs,
            opset=opset,
            overwrite=overwrite,
        )
    if probabilities is not None:
        check_bool(probabilities, "probabilities")
    request = checked_request(
        model,
        path,
        format,
        quantize=quantize,
        has_samples=samples is not None,
        include_preprocessing=include_preprocessing,
        opset=opset,
        tolerance=tolerance,
        overwrite=overwrite,
    )
    plan = ExportPlan.of(
        model, request, labels, preprocessing, include_preprocessing, check_inputs
    )
    sampled = None if samples is None else sample_array(samples, plan.file_inputs)
    batches = comparison.batches_of(plan.arrays(check_inputs, sampled), sampled is not None)
    with _without_tensor_float_32(), temporary_path(request.path) as temporary:
        expected = [plan.outputs_of(model, batch) for batch in batches]
        plan.check_outputs(model, expected[0])
        kind = kind_of(model, expected[0])
        check_probabilities(model, probabilities, kind, expected[0])
        added = (_activation(plan) if kind != PROBABILITY else None) if probabilities else None
        remove_activation = probabilities is False and kind == PROBABILITY
        returns = kind if probabilities is None else PROBABILITY if probabilities else LOGITS
        scale = _Scale.of(plan)
        copied = remove_activation or scale is not None or request.format == "keras"
        with ordinary_model(model, always_copy=copied) as plain:
            if sixteen_bit_type(model) is not None:
                in_float32 = [plan.outputs_of(plain, batch) for batch in batches]
                _check_float32(model, in_float32, expected)
                expected = in_float32
            if remove_activation:
                plain, expected = _logits(plan, plain, batches, expected)
            if added is not None:
                expected = [activated(outputs, added) for outputs in expected]
            if scale is not None:
                absorb_scale(plain, *scale)
            needs, outputs = _write_and_run(
                plan, plain, temporary, sampled, batches, returns, added
            )
        if scale is not None:
            outputs = [scale.removed(y) for y in outputs]
        has_classes = plan.task is None or plan.task.activation == "softmax"
        result = comparison.compare(outputs, expected, has_classes=has_classes)
        _check(request, model, result)
        exported = Exported(
            request.path,
            request.format,
            size_of(temporary),
            result.difference,
            plan.file_inputs.tensors,
            result.outputs,
            request.quantize,
            result.agreement,
            needs,
            returns,
            None if request.format != "keras" else opening(model, needs, request.path.name),
        )
        values = describe(
            exported, plan.labels, plan.preprocessing, include_preprocessing, plan.file_task()
        )
        description = description_path(temporary)
        description.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        move_into_place(description, exported.description)
        move_into_place(temporary, request.path)
    return exported


class _Scale(NamedTuple):
    """The mean and standard deviation of the numbers of a regression."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, plan: ExportPlan) -> _Scale | None:
        task = plan.task
        if task is None or task.mean is None or task.std is None:
            return None
        return cls(task.mean, task.std)

    def removed(self, outputs: Outputs) -> Outputs:
        """The outputs in units of the standard deviation, which show small differences."""
        return {k: standardised(y, *self).astype(y.dtype) for k, y in outputs.items()}


def _activation(plan: ExportPlan) -> str:
    """What turns the logits of the model into probabilities."""
    return (plan.task.activation if plan.task is not None else None) or "softmax"


def _export_bank(
    bank: AdapterBank, unused: dict[str, Any], *args: Any, **kwargs: Any
) -> Exported:
    for name, value in unused.items():
        if value is not None:
            raise ValueError(
                f"Received {name}={value!r} with a bank; expected None. Each adapter of a bank "
                "has its own labels, and the file returns what the model returns, in float32."
            )
    return export_bank(bank, *args, **kwargs)


def _write_and_run(
    plan: ExportPlan,
    plain: Any,
    path: Path,
    samples: Any,
    batches: list[list[np.ndarray]],
    returns: str | None,
    activation: str | None,
) -> tuple[tuple[str, ...], list[Outputs]]:
    """Write the file and run it on the batches."""
    format = plan.request.format
    try:
        needs = plan.write(plain, path, samples, returns=returns, activation=activation)
        run = runner_of(format, path, plan.file_inputs, plain)
        return needs, [run(batch) for batch in batches]
    except OSError:
        raise
    except Exception as error:  # converters and runtimes raise anything
        raise ValueError(
            f"Model '{plain.name}' cannot be exported to the format {format!r}: {error}"
        ) from error


def _logits(
    plan: ExportPlan, plain: Any, batches: list[list[np.ndarray]], expected: list[Outputs]
) -> tuple[Any, list[Outputs]]:
    """Remove the activation at the end of a model.

    Returns:
        The model, and its outputs for the batches.

    Raises:
        ValueError: if the activation cannot be removed, or the outputs before it do not lead to
            the expected probabilities.
    """
    activation = output_activation(plain)
    plain = without_output_activation(plain)
    logits = [plan.outputs_of(plain, batch) for batch in batches]
    again = [activated(outputs, activation) for outputs in logits]
    difference = comparison.compare(again, expected).difference
    bound = comparison.TOLERANCES["keras"]
    if not difference <= bound:
        raise ValueError(
            f"The {activation} at the end of model '{plain.name}' cannot be removed: the "
            f"probabilities computed from its logits differ from its outputs by "
            f"{difference:.2g}; expected at most {bound:g}. Export the probabilities."
        )
    return plain, logits


def _check_float32(model: Any, in_float32: list[Outputs], expected: list[Outputs]) -> None:
    """Raise unless the outputs of a 16-bit model are close to those of its float32 copy."""
    name = str(sixteen_bit_type(model))
    bound = comparison.SIXTEEN_BIT[name.removeprefix("mixed_")]
    difference = comparison.compare(in_float32, expected).difference
    if not difference <= bound:
        raise ValueError(
            f"Model '{model.name}' computes in {name}. Its outputs differ from those in "
            f"float32, the dtype of exported files, by {difference:.2g} of the largest output; "
            f"expected at most {bound:g}. Nothing was written. The model may overflow in 16 "
            "bits: check its outputs in float32."
        )


def _check(request: ExportRequest, model: Any, result: comparison.Comparison) -> None:
    """Raise unless the differences are within the tolerance of the format."""
    bound = request.tolerance or comparison.TOLERANCES[request.kind]
    remedies = {
        "int8": "Pass more typical samples, or use quantize='dynamic' or 'float16'",
        "dynamic": "Use quantize='float16'",
        "float16": "Leave quantize out",
        "keras": "Keras may not restore one of its classes correctly: try another format",
    }
    remedy = remedies.get(request.kind, "Try another format")
    if not result.difference <= bound:
        raise ValueError(
            f"The outputs of model '{model.name}' exported as {request.kind} differ from those "
            f"of the model by {result.difference:.2g} of the largest output; expected at most "
            f"{bound:g}. Nothing was written to {request.path}. {remedy}, or pass a larger "
            "tolerance= if this accuracy is sufficient."
        )
    if result.agreement is not None and result.agreement < comparison.AGREEMENT:
        same = math.floor(1000 * result.agreement) / 10  # not rounded up to the bound
        raise ValueError(
            f"Model '{model.name}' exported as {request.kind} has the same top class as the "
            f"model for only {same:g} % of the samples; expected at least "
            f"{100 * comparison.AGREEMENT:g} %. Nothing was written to {request.path}. "
            f"{remedy}."
        )


@contextlib.contextmanager
def _without_tensor_float_32() -> Iterator[None]:
    """Disable TensorFloat-32, whose products on a GPU have only 10 bits of mantissa."""
    if not installed("tensorflow"):
        yield
        return
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
