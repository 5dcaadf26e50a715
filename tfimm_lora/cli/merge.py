"""``tfimm-lora merge``: the ordinary model that a LoRA model stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.cli.app import Json, app, typer
from tfimm_lora.cli.export import checked_place, open_source, tell
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
        Path, typer.Argument(help="The folder that finetune made, or a saved Keras model.")
    ],
    out: Annotated[Path, typer.Option(help="The new file; it ends in .keras.")],
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Put this adapter into the model first: a folder, or hf://user/repo."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the ordinary model, with what LoRA learned added to its weights.

    It has ordinary layers, costs what the base model costs, and loads without
    this package; a tfimm model needs tfimm and tf-keras.
    """
    checked_place(out, "keras", overwrite)
    opened = open_source(source)
    model, labels = opened.model, opened.labels
    if adapter is not None:
        model = load_adapter(model, adapter)
        labels = None  # an adapter may bring a classifier of other classes
    elif not has_lora(model):
        raise ValueError(
            f"{source} has no LoRA layers, so there is nothing to merge. Pass --adapter with "
            "the folder of one, or write the model in another format with tfimm-lora export."
        )
    exported = export(
        model,
        out,
        "keras",
        labels=labels,
        preprocessing=opened.preprocessing,
        overwrite=overwrite,
    )
    tell(source, exported, as_json)
