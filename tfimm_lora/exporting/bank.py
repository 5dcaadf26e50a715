"""Export a bank: one file with a model and many adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.bank.bank import AdapterBank, BankContent
from tfimm_lora.bank.source import OPTIONAL
from tfimm_lora.exporting import bank_onnx, bank_savedmodel, comparison
from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.exporting.export_plan import ExportPlan
from tfimm_lora.exporting.exported import Exported, description_path, size_of
from tfimm_lora.exporting.output_kind import PROBABILITY, kind_of
from tfimm_lora.exporting.plain_model import sixteen_bit_type
from tfimm_lora.exporting.request import ExportRequest, checked_request
from tfimm_lora.exporting.serving import OUTPUT
from tfimm_lora.model.output_activation import PROBABILITIES
from tfimm_lora.utils.atomic_files import move_into_place, temporary_path
from tfimm_lora.version import __version__

#: The formats of a bank.
FORMATS = ("savedmodel", "onnx")

#: An input, and the name of its adapter.
Row = tuple[np.ndarray, str | None]


class BankFile(NamedTuple):
    """What a file of a bank is made of."""

    plan: ExportPlan
    bank: AdapterBank
    content: BankContent
    #: The parts that only some adapters have, and those of this bank do.
    optional: frozenset[str]


def export_bank(
    bank: AdapterBank,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    preprocessing: Any = None,
    include_preprocessing: bool = False,
    tolerance: float | None = None,
    check_inputs: Any = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a bank to a SavedModel or to ONNX; see ``export``."""
    content = bank.content()
    model = content.model
    framework = backend_of(model).framework()
    if framework != "tensorflow":
        raise ValueError(
            f"Received a bank of a model on {framework}; expected one on TensorFlow. Create "
            "the bank in another process with KERAS_BACKEND=tensorflow, from the same adapters."
        )
    request = checked_request(
        model,
        path,
        format,
        quantize=None,
        has_samples=False,
        include_preprocessing=include_preprocessing,
        opset=opset,
        tolerance=tolerance,
        overwrite=overwrite,
    )
    if request.format not in FORMATS:
        raise ValueError(
            f"Received the format {request.format!r} for a bank; expected 'savedmodel' or "
            "'onnx'. For other formats, load one adapter into a model with load_adapter and "
            "export the model."
        )
    if sixteen_bit_type(model) is not None:
        raise ValueError(
            f"Received a bank of model '{model.name}', which computes in "
            f"{sixteen_bit_type(model)}; expected a model in float32. Create the bank with one."
        )
    plan = ExportPlan.of(
        model, request, None, preprocessing, include_preprocessing, check_inputs
    )
    found = frozenset().union(*(entry.optional for entry in content.entries.values()))
    made = BankFile(plan, bank, content, frozenset(OPTIONAL) & found)
    module = bank_savedmodel if request.format == "savedmodel" else bank_onnx
    with temporary_path(request.path) as temporary:
        try:
            outputs = module.write(made, temporary)
            run = module.runner(made, temporary)
            difference = _largest_difference(made, run, check_inputs)
        except OSError:
            raise
        except Exception as error:  # converters and runtimes raise anything
            raise ValueError(
                f"The bank of model '{model.name}' cannot be exported to the format "
                f"{request.format!r}: {error}"
            ) from error
        _check(request, difference)
        exported = Exported(
            request.path,
            request.format,
            size_of(temporary),
            difference,
            (*plan.file_inputs.tensors, *module.INPUTS),
            outputs,
            returns=_returns(made, check_inputs),
        )
        description = description_path(temporary)
        values = json.dumps(_describe(made, exported), indent=2) + "\n"
        description.write_text(values, encoding="utf-8")
        for extra in module.extra_files(temporary):
            move_into_place(extra, request.path.with_name(extra.name))
        move_into_place(description, exported.description)
        move_into_place(temporary, request.path)
    return exported


def _rows(made: BankFile, check_inputs: Any) -> list[Row]:
    """Inputs with an adapter for each: all adapters, and the model without one."""
    (array,) = made.plan.arrays(check_inputs, None)
    names = list(made.content.entries)
    count = max(len(names), 3)
    return [(array[i % len(array)], names[i % len(names)]) for i in range(count)]


def _largest_difference(
    made: BankFile, run: Callable[[list[Row]], list[np.ndarray]], check_inputs: Any
) -> float:
    """The largest difference of the file from the bank, row by row, relative to the outputs."""
    rows, worst = _rows(made, check_inputs), 0.0
    for first in range(0, len(rows), 16):
        batch = rows[first : first + 16]
        soft = made.content.activation in PROBABILITIES
        expected: Outputs = {
            str(i): row.probabilities if soft else row.logits
            for i, row in enumerate(_predict(made, batch))
        }
        received = run(batch)
        outputs = {str(i): x[: expected[str(i)].shape[-1]] for i, x in enumerate(received)}
        worst = max(worst, comparison.relative_difference(outputs, expected))
    return worst


def _predict(made: BankFile, batch: list[Row]) -> Any:
    inputs = np.stack([x for x, _ in batch])
    if made.plan.prepare is not None:
        inputs = np.asarray(made.plan.prepare(inputs))
    return made.bank.predict(inputs, [name for _, name in batch])


def _check(request: ExportRequest, difference: float) -> None:
    bound = request.tolerance or comparison.TOLERANCES[request.format]
    if not difference <= bound:
        raise ValueError(
            f"The outputs of the file differ from those of the bank by {difference:.2g} of the "
            f"largest output; expected at most {bound:g}. Nothing was written. If you can "
            "accept this, pass tolerance=."
        )


def _returns(made: BankFile, check_inputs: Any) -> str | None:
    if made.content.activation in PROBABILITIES:
        return PROBABILITY
    (array,) = made.plan.arrays(check_inputs, None)
    row = _predict(made, [(array[0], None)])[0]
    return kind_of(made.content.model, {OUTPUT: row.logits[None]})


def _describe(made: BankFile, exported: Exported) -> dict[str, Any]:
    """The description beside the file, as plain values."""
    values = exported.to_dict()
    layout = made.content.layout
    return {
        **{name: values[name] for name in ("format", "inputs", "outputs", "returns")},
        "adapters": {
            "" if name is None else name: {"classes": entry.classes, "labels": entry.labels}
            for name, entry in made.content.entries.items()
        },
        "max_rank": layout.max_rank,
        "max_classes": layout.max_classes,
        "preprocessing": made.plan.preprocessing,
        "preprocessing_included": made.plan.prepare is not None,
        "difference": exported.difference,
        "made_by": f"tfimm_lora {__version__}",
    }
