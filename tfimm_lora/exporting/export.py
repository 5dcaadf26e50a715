"""``export``: a model as a file for production, compared before it is said to be done."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.exporting import comparison
from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.exporting.description import described
from tfimm_lora.exporting.export_plan import Plan
from tfimm_lora.exporting.exported import Exported, description_path
from tfimm_lora.exporting.pictures import sample_array
from tfimm_lora.exporting.plain_model import ordinary_model, sixteen_bit_type
from tfimm_lora.exporting.request import Request, checked_request
from tfimm_lora.exporting.runners import runner_of
from tfimm_lora.utils.atomic_files import draft_of, put, size_of


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
) -> Exported:
    """Write a model as a file that needs this package no more, and compare the two.

    Updates are merged in a copy: the model is the same before and after, bit for bit. All
    formats take a batch of any size. A model that computes in 16 bits is written in float32.
    The file is run on seeded inputs in batches of one and three; if its outputs are not the
    model's, that is an error and nothing is left at ``path``. Beside the file ``<name>.json``
    says what it takes and gives, with labels and preprocessing.

    Args:
        model: A built model of either Keras, with LoRA (merged or not) or without.
        path: The file, or the folder of a SavedModel, in a folder that exists.
        format: "keras" (ordinary layers; a tfimm model needs tfimm and tf-keras to load),
            "savedmodel" (needs TensorFlow alone), "tflite" or "onnx" (needs tf2onnx and
            onnxruntime to be made). Default: from the path's suffix, .keras, .tflite, .onnx or
            none. All but "keras" need a model on TensorFlow.
        labels: Names of the classes, in the order of the outputs.
        preprocessing: How pictures become inputs: that of a run, or anything with mean, std
            and input_size. Default: that of a tfimm model's config, else none.
        include_preprocessing: Whether the file does it itself. It then takes RGB pictures in
            0..255, as float32, of the input size. Not for "keras".
        quantize: For "tflite": "float16" (weights in half the bytes), "dynamic" (weights in
            int8, a quarter of the bytes) or "int8" (activations, too: for processors without
            floating point; inputs and outputs stay float32). int8 suits convolutional
            networks; attention and layer normalisation lose much, which the comparison finds.
        samples: For "int8": some hundred typical inputs, as the file takes them; an array, a
            list, or a ``tf.data.Dataset``.
        tolerance: The largest difference from the model's outputs, relative to the largest of
            them. Default: 1e-4 for "keras" and "savedmodel", 1e-3 for "tflite" and "onnx",
            0.05 for "float16", 0.25 for "dynamic". For "int8" 0.5, and of the samples nine in
            ten must have the same top class.
        check_inputs: Inputs to compare with, as the file takes them. Default: ``samples``, or
            seeded pictures that went through the preprocessing.
        opset: For "onnx": the version of its operators, 13 to 18. Default: 17.
        overwrite: Whether a file at ``path`` may be replaced.

    Returns:
        What was written, and the difference that was seen.

    Raises:
        ValueError: for arguments that do not fit, a model that the format cannot hold, or
            outputs that are not the model's.
        OSError: if ``path`` is taken, or its folder does not exist.
        ImportError: if a package is missing.

    Example:
        >>> import tempfile, tensorflow as tf, tfimm_lora as lora
        >>> from tfimm_lora.exporting import export
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> done = export(model, tempfile.mkdtemp() + "/model.keras", labels=["a", "b", "c"])
        >>> done.format, done.difference < 1e-4, done.description.name
        ('keras', True, 'model.keras.json')
    """
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
    plan = Plan.of(model, request, labels, preprocessing, include_preprocessing, check_inputs)
    sampled = None if samples is None else sample_array(samples, plan.takes)
    batches = comparison.batches_of(plan.arrays(check_inputs, sampled), sampled is not None)
    with _exact_products(), draft_of(request.path) as draft:
        expected = [plan.outputs_of(model, batch) for batch in batches]
        plan.check_outputs(model, expected[0])
        with ordinary_model(model, always_copy=request.format == "keras") as plain:
            if sixteen_bit_type(model) is not None:
                in_float32 = [plan.outputs_of(plain, batch) for batch in batches]
                _check_float32(model, in_float32, expected)
                expected = in_float32
            needs, outputs = _written_and_run(plan, plain, draft, sampled, batches)
        found = comparison.compare(outputs, expected)
        _check(request, model, found)
        exported = Exported(
            request.path,
            request.format,
            size_of(draft),
            found.difference,
            plan.takes.tensors,
            found.outputs,
            request.quantize,
            found.agreement,
            needs,
        )
        values = described(exported, plan.labels, plan.preprocessing, include_preprocessing)
        beside = description_path(draft)
        beside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        put(beside, exported.description)
        put(draft, request.path)
    return exported


def _written_and_run(
    plan: Plan, plain: Any, draft: Path, samples: Any, batches: list[list[np.ndarray]]
) -> tuple[tuple[str, ...], list[Outputs]]:
    """Write the draft and run it; errors of converters and runtimes say which file it is."""
    format = plan.request.format
    try:
        needs = plan.write(plain, draft, samples)
        run = runner_of(format, draft, plan.takes, plain)
        return needs, [run(batch) for batch in batches]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"Model '{plain.name}' cannot be written in the format {format!r}: {error}"
        ) from error


def _check_float32(model: Any, in_float32: list[Outputs], expected: list[Outputs]) -> None:
    """Raise unless a model of 16 bits is itself when it computes in float32."""
    name = str(sixteen_bit_type(model))
    bound = comparison.SIXTEEN_BIT[name.removeprefix("mixed_")]
    difference = comparison.compare(in_float32, expected).difference
    if not difference <= bound:
        raise ValueError(
            f"Model '{model.name}', which computes in {name}, differs from itself in float32, "
            f"in which files are written, by {difference:.2g} of its largest output; expected "
            f"{bound:g} at most. Nothing was written. Its 16 bits may overflow: give it "
            "float32 and look at its outputs."
        )


def _check(request: Request, model: Any, found: comparison.Comparison) -> None:
    """Raise unless the file is the model, up to what its format is allowed."""
    bound = request.tolerance or comparison.TOLERANCES[request.kind]
    remedies = {
        "int8": "Pass more and typical samples, or use quantize='dynamic' or 'float16'",
        "dynamic": "Use quantize='float16'",
        "float16": "Leave quantize out",
        "keras": "Keras may make one of its classes otherwise than it was: try another format",
    }
    remedy = remedies.get(request.kind, "Try another format")
    if not found.difference <= bound:
        raise ValueError(
            f"The outputs of model '{model.name}' as {request.kind} differ from its own by "
            f"{found.difference:.2g} of the largest; expected {bound:g} at most. Nothing was "
            f"written to {request.path}. {remedy}, or pass tolerance= if that much will do."
        )
    if found.agreement is not None and found.agreement < comparison.AGREEMENT:
        raise ValueError(
            f"Model '{model.name}' as {request.kind} has its own top class for only "
            f"{found.agreement:.0%} of the samples; expected {comparison.AGREEMENT:.0%}. "
            f"Nothing was written to {request.path}. {remedy}."
        )


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Within this block TensorFlow on a GPU multiplies in float32, not in TF32 of 10 bits."""
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
