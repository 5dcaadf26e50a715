"""``tfimm-lora merge``: merge a LoRA model into an ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.cli.app import Json, app
from tfimm_lora.cli.export import Probabilities, checked_format, open_source, show_result
from tfimm_lora.cli.outputs import Overwrite
from tfimm_lora.exporting.export import export
from tfimm_lora.model.merge import has_lora

EXAMPLES = """Examples:

tfimm-lora merge runs/flowers --out flowers.keras

tfimm-lora merge lora-model.keras --out model.keras

tfimm-lora merge base.keras --adapter adapters/cats --out cats.keras --json
"""


@app.command("merge", epilog=EXAMPLES)
def merge_command(
    source: Annotated[
        Path, typer.Argument(help="The folder of a finetune run, or a saved Keras model.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, with the suffix .keras.")],
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Load this adapter into the model first: a folder, or hf://user/repo."
        ),
    ] = None,
    probabilities: Probabilities = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Merge the LoRA updates into the weights and write the ordinary model.

    It has ordinary layers, is as large and fast as the base model, and loads
    without this package. A tfimm model needs tfimm and tf-keras. The model
    returns probabilities if the base model ended in a softmax, else logits;
    that of a regression, numbers.
    """
    checked_format(out, "keras", overwrite)
    opened = open_source(source)
    model, labels = opened.model, opened.labels
    if adapter is not None:
        model = load_adapter(model, adapter)
        labels = None  # the adapter may contain a classifier with other classes
    elif not has_lora(model):
        raise ValueError(
            f"{source} has no LoRA layers; expected a LoRA model. Pass --adapter with the "
            "folder of an adapter, or use tfimm-lora export for another format."
        )
    exported = export(
        model,
        out,
        "keras",
        labels=labels,
        preprocessing=opened.preprocessing,
        overwrite=overwrite,
        probabilities=opened.kind(probabilities),
    )
    show_result([source], exported, as_json)
