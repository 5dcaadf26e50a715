"""``tfimm-lora export``: export a run or a saved model for production."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.backend import default_backend
from tfimm_lora.cli.app import Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.export_bank import open_runs, require_none
from tfimm_lora.cli.outputs import Overwrite, refuse_to_overwrite
from tfimm_lora.cli.picture_sources import find_pictures
from tfimm_lora.cli.tables import show_facts
from tfimm_lora.cli.unfinished import warn_if_unfinished
from tfimm_lora.exporting.bank_onnx import adapters_folder
from tfimm_lora.exporting.description import read_description
from tfimm_lora.exporting.export import export
from tfimm_lora.exporting.exported import Exported, TensorInfo, description_path
from tfimm_lora.exporting.opening import instructions
from tfimm_lora.exporting.request import check_path, format_of
from tfimm_lora.finetuning.base.keras_files import load_keras_model
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, read_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.report.formatting import byte_text, percent
from tfimm_lora.finetuning.run import CONFIG, Run
from tfimm_lora.model.state import record_task
from tfimm_lora.model.task_record import TaskRecord

EXAMPLES = """Examples:

tfimm-lora export runs/flowers --out flowers.onnx --probabilities

tfimm-lora export runs/flowers --out flowers.tflite --include-preprocessing

tfimm-lora export runs/flowers --out flowers.tflite --quantize int8 --samples pictures/train

tfimm-lora export model.keras --format savedmodel --out served/model/1 --json

tfimm-lora export runs/cats runs/dogs --format savedmodel --out served/pets/1
"""

#: The number of samples for quantization; more take longer and do not improve the ranges.
_SAMPLES = 200


#: ``--probabilities`` and ``--logits`` of the commands that write a model.
Probabilities = Annotated[
    bool | None,
    typer.Option(
        "--probabilities/--logits",
        help="What the file returns. Default: what the model returned before fine-tuning.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class OpenedModel:
    """A model with its labels and preprocessing, if they are known.

    ``probabilities`` is the default of ``export``.
    """

    model: Any
    labels: list[str] | None
    preprocessing: Preprocessing | None
    probabilities: bool | None = None

    def kind(self, requested: bool | None) -> bool | None:
        """``probabilities`` of ``export``: as requested, or the default of the model."""
        return self.probabilities if requested is None else requested


@app.command("export", epilog=EXAMPLES)
def export_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a finetune run, or a saved Keras model. Several runs of one "
            "base model: a file with all their adapters (savedmodel or onnx).",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The file to write, or the folder of a SavedModel.")
    ],
    format: Annotated[
        str | None,
        typer.Option(help="keras, savedmodel, tflite or onnx. Default: by suffix of --out."),
    ] = None,
    include_preprocessing: Annotated[
        bool,
        typer.Option(
            "--include-preprocessing",
            help="Add the preprocessing: the file takes RGB pictures in [0, 255] (float32).",
        ),
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(help="For tflite: float16, dynamic or int8 (weights and activations)."),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help=f"For int8: a folder of typical pictures; {_SAMPLES} are used."),
    ] = None,
    probabilities: Probabilities = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest allowed difference, relative to the outputs of the model."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="For onnx: 13 to 18. Default: 17.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a model to a file that runs without this package.

    The outputs of the file are compared with those of the model. If they differ,
    nothing is written. Labels and preprocessing are written to a JSON file
    beside it.

    Several runs become one model with an adapter for each: in a SavedModel for
    each row of a batch, in ONNX for each call.

    A run returns logits, or probabilities if its base model ended in a softmax.
    A saved model returns what it returned before.
    """
    format = checked_format(out, format, overwrite)
    if len(sources) > 1:
        options = {
            "--quantize": quantize,
            "--samples": samples,
            "--probabilities or --logits": probabilities,
        }
        require_none(options)
        runs = open_runs(sources)
        exported = export(
            runs.bank,
            out,
            format,
            preprocessing=runs.preprocessing,
            include_preprocessing=include_preprocessing,
            tolerance=tolerance,
            opset=opset,
            overwrite=overwrite,
        )
        show_result(sources, exported, as_json)
        if exported.format == "onnx":
            note(f"adapters: {adapters_folder(exported.path)}")
        return
    (source,) = sources
    opened = open_source(source)
    inputs = None
    if samples is not None:
        inputs = sample_pictures(samples, opened.preprocessing, include_preprocessing)
    exported = export(
        opened.model,
        out,
        format,
        labels=opened.labels,
        preprocessing=opened.preprocessing,
        include_preprocessing=include_preprocessing,
        quantize=quantize,
        samples=inputs,
        tolerance=tolerance,
        opset=opset,
        overwrite=overwrite,
        probabilities=opened.kind(probabilities),
    )
    show_result([source], exported, as_json)


def checked_format(out: Path, format: str | None, overwrite: bool) -> str:
    """Determine the format of ``--out`` and check the path before the model is opened.

    Raises:
        ValueError, OSError: if the file cannot be written.
    """
    format = format_of(out, format)
    for path in (out, description_path(out)):
        refuse_to_overwrite(path, overwrite)
    check_path(out.absolute(), format, overwrite)
    return format


def open_source(path: Path) -> OpenedModel:
    """Open the model of a run or of a file.

    The labels and preprocessing of an exported file are read from its description.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if it cannot be loaded.
    """
    import_tensorflow()
    if (path / CONFIG).is_file():
        run = Run.open(path)
        warn_if_unfinished(run)
        returned = run.base_returned_probabilities and run.task.activation is not None
        by_default = True if returned else None
        return OpenedModel(run.model(), run.labels, run.preprocessing, by_default)
    model = _load(path)
    description = read_description(path)
    if description.get("task") is not None:
        record_task(model, TaskRecord.from_dict(description["task"]))
    values = description.get("preprocessing")
    cfg = getattr(model, "cfg", None)
    preprocessing = None
    if values is not None:
        preprocessing = Preprocessing.from_dict(values)
    elif hasattr(cfg, "mean"):
        preprocessing = Preprocessing.of(cfg)
    return OpenedModel(model, description.get("labels"), preprocessing)


def _load(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected the folder of a finetune run, or a saved Keras "
            "model."
        )
    is_model = path.is_file() or (path / "saved_model.pb").is_file()
    if not is_model:
        raise ValueError(
            f"Received {path}; expected the folder of a finetune run (with {CONFIG}) or a "
            "saved Keras model (.keras, .h5, or a SavedModel of legacy Keras)."
        )
    backend = default_backend()
    model = load_keras_model(path)
    if not isinstance(model, backend.keras.Model):
        raise ValueError(
            f"{path} is a SavedModel without a Keras model, which cannot be converted to "
            "another format. Export from the run or from a Keras file."
        )
    return model


def sample_pictures(
    folder: Path, preprocessing: Preprocessing | None, as_pictures: bool
) -> np.ndarray:
    """Read sample pictures as inputs of the exported file.

    Args:
        folder: A folder with pictures, also in subfolders. If there are too many, evenly
            spaced ones are used.
        preprocessing: The preprocessing of the model.
        as_pictures: Whether the file takes pictures in [0, 255]; else they are normalized.

    Raises:
        ValueError: without preprocessing, or if no picture can be read.
    """
    if preprocessing is None:
        raise ValueError(
            "Received --samples for a model whose preprocessing is unknown; expected the "
            "folder of a finetune run, or the file of a tfimm model."
        )
    if as_pictures:
        n = preprocessing.in_channels
        preprocessing = dataclasses.replace(
            preprocessing, mean=(0.0,) * n, std=(1 / 255,) * n, channel_order="rgb"
        )
    prepare = preprocessing.function(resize=True)
    paths = find_pictures([str(folder)]).names
    if not paths:
        raise ValueError(
            f"Received --samples {folder}, which contains no pictures; expected a folder of "
            "typical pictures."
        )
    chosen = np.unique(np.linspace(0, len(paths) - 1, _SAMPLES).round().astype(int))
    found = []
    for i in chosen:
        try:
            picture = read_picture(paths[i], preprocessing.in_channels)
        except UnreadablePicture as error:
            note(f"skipped: {error}")
        else:
            found.append(np.asarray(prepare(picture), "float32"))
    if not found:
        raise ValueError(
            f"Received --samples {folder}, in which no picture can be read; expected typical "
            "pictures."
        )
    note(f"samples: {len(found)} of {len(paths)} pictures in {folder}")
    return np.stack(found)


def show_result(sources: list[Path], exported: Exported, as_json: bool) -> None:
    """Print the properties of the exported file."""
    data = {
        "source": str(sources[0]) if len(sources) == 1 else list(map(str, sources)),
        **exported.to_dict(),
        "description": str(exported.description),
    }
    emit(data, as_json, lambda: _show(exported))
    if exported.open_with is not None:
        note(instructions(exported.open_with, exported.needs))


def _show(exported: Exported) -> None:
    facts = [
        ("file", str(exported.path)),
        ("format", " ".join(filter(None, (exported.format, exported.quantize)))),
        ("size", byte_text(exported.bytes)),
        ("inputs", ", ".join(map(_text, exported.inputs))),
        ("outputs", ", ".join(map(_text, exported.outputs))),
        ("returns", exported.returns or "the outputs of the model (kind unknown)"),
        ("largest difference", f"{exported.difference:.2g} of the largest output"),
        ("labels and preprocessing", str(exported.description)),
    ]
    if exported.agreement is not None:
        facts.insert(-1, ("same top class", f"{percent(exported.agreement)} of the samples"))
    show_facts(facts)


def _text(tensor: TensorInfo) -> str:
    shape = ", ".join("any" if size is None else str(size) for size in tensor.shape)
    return f"{tensor.name} ({shape}) {tensor.dtype}"
