"""``tfimm-lora convert``: write an adapter with the names of another library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.model_names import NAMES, naming_of_adapter, target_naming
from tfimm_lora.adapters.translate_adapter import translate_adapter
from tfimm_lora.cli.app import Json, app, emit
from tfimm_lora.cli.inspect import naming_facts, open_adapter
from tfimm_lora.cli.outputs import Overwrite, refuse_to_overwrite
from tfimm_lora.cli.tables import show_facts

EXAMPLES = """Examples:

tfimm-lora convert hf://user/vit-lora adapters/vit --to timm

tfimm-lora convert runs/flowers out --to transformers --dialect v4

tfimm-lora convert runs/flowers out --to transformers --prefix ""

tfimm-lora convert runs/dora out --to timm --model vit_base_patch16_224
"""


@app.command("convert", epilog=EXAMPLES)
def convert_command(
    adapter: Annotated[
        str, typer.Argument(help="Folder of an adapter or of a run, or hf://user/repo.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the new adapter.")],
    to: Annotated[str, typer.Option(help=f"The library: {', '.join(NAMES)}.")],
    dialect: Annotated[
        str | None,
        typer.Option(
            help="For transformers: v4 or v5, the version that will load it. Default: v5."
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="What comes before the names of the backbone in OUTPUT. Default: as in the "
            "library's model with a classifier."
        ),
    ] = None,
    source_prefix: Annotated[
        str | None,
        typer.Option(help="The same in ADAPTER. Default: found from the names."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Name of the base model in OUTPUT. Default: as in ADAPTER."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model with its weights: a name or file as for finetune. Needed only "
            "if an adapter with DoRA lacks some of query, key and value."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter with the names of another library.

    The updates stay the same. Where one library has separate layers for query,
    key and value and the other a fused projection, they are converted exactly,
    and the ranks and the number of layers change.
    """
    for given in (Path(adapter), Path(adapter) / "adapter"):
        if given.exists() and output.resolve() == given.resolve():
            raise ValueError(
                f"Received the output {output}, which is the adapter to convert; expected "
                "another folder."
            )
    refuse_to_overwrite(output, overwrite)
    before = open_adapter(adapter)
    source = naming_of_adapter(before, source_prefix)
    target = target_naming(source, to, dialect, prefix)
    after = translate_adapter(
        before,
        to,
        dialect=dialect,
        prefix=prefix,
        source_prefix=source_prefix,
        model=None if model is None else _base(model),
    )
    if base_model is not None:
        after = dataclasses.replace(after, base_model=base_model)
    after.save(output)
    data = {
        "adapter": adapter,
        "out": str(output),
        "before": {"names": naming_facts(source), **_numbers(before)},
        "after": {"names": naming_facts(target), **_numbers(after)},
    }
    emit(data, as_json, lambda: show(data))


def _base(name: str) -> Any:
    """Open the base model. Only its weights matter, so any normalization will do."""
    from tfimm_lora.finetuning.base_model import open_base_model

    is_file = Path(name).exists()
    normalisation = "unit" if is_file else None
    return open_base_model(name, pretrained=not is_file, normalisation=normalisation).model


def _numbers(adapter: Adapter) -> dict[str, Any]:
    return {
        "base_model": adapter.base_model,
        "layers": len(adapter.layers),
        "ranks": sorted({update.rank for update in adapter.layers.values()}),
        "full_weights": len(adapter.weights),
    }


def show(data: dict[str, Any]) -> None:
    """Print what was recognized and written."""
    before, after = data["before"], data["after"]
    show_facts(
        [
            ("adapter", data["out"]),
            ("recognized", before["names"]["description"]),
            ("written", after["names"]["description"]),
            ("base model", after["base_model"] or "unknown"),
            ("layers", f"{before['layers']} -> {after['layers']}"),
            ("rank", " -> ".join(", ".join(map(str, x["ranks"])) for x in (before, after))),
            ("full weights", f"{before['full_weights']} -> {after['full_weights']}"),
        ]
    )
