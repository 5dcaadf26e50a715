"""``tfimm-lora combine``: combine several adapters into one."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from tfimm_lora.adapters.combine import combination_errors, combine_adapters
from tfimm_lora.adapters.combine_updates import COMBINATION_TYPES
from tfimm_lora.cli.app import Json, app, emit, note
from tfimm_lora.cli.inspect import open_adapter
from tfimm_lora.cli.outputs import Overwrite, refuse_to_overwrite
from tfimm_lora.cli.parsing import parse_weights
from tfimm_lora.cli.tables import show_facts
from tfimm_lora.finetuning.report.formatting import byte_text, percent

EXAMPLES = """Examples:

tfimm-lora combine adapters/cats adapters/dogs --out adapters/both

tfimm-lora combine cats dogs --weights 1,-0.5 --out fewer-dogs

tfimm-lora combine cats dogs --method svd --rank 8 --out small

tfimm-lora combine cats dogs --method ties_svd --density 0.2 --out ties
"""


@app.command("combine", epilog=EXAMPLES)
def combine_command(
    adapters: Annotated[
        list[str], typer.Argument(help="Folders of adapters or runs, or hf://user/repo.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new adapter.")],
    method: Annotated[str, typer.Option(help=", ".join(COMBINATION_TYPES))] = "cat",
    weights: Annotated[
        str | None, typer.Option(help="A number for each, such as 0.5,0.5. Default: 1 each.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries to keep, for ties and dare.")
    ] = None,
    majority_sign: Annotated[str, typer.Option(help="For ties: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Random seed, for dare.")] = 0,
    trained_whole: Annotated[
        str | None,
        typer.Option(
            help="For classifier and biases: average, or the number of the adapter whose "
            "values to keep, counted from 1. Required if they differ."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Name of the model, if the adapters name different ones.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Combine several adapters into one, as a weighted sum of their updates.

    "cat" computes the exact sum; its rank is the sum of the ranks. "svd" computes
    the best approximation of a given --rank. The others prune and merge the
    updates as in TIES and DARE.
    """
    refuse_to_overwrite(out, overwrite)
    given = [open_adapter(address) for address in adapters]
    if base_model is not None:
        given = [dataclasses.replace(x, base_model=base_model) for x in given]
    numbers = None if weights is None else parse_weights(weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        combined = combine_adapters(
            given,
            numbers,
            method,
            rank=rank,
            density=density,
            majority_sign_method=majority_sign,
            seed=seed,
            trained_whole=_adapter_index(trained_whole, len(given)),
        )
    for warning in caught:
        note(f"warning: {warning.message}")
    errors = {}
    if combined.use_dora:
        note("warning: the error of a combination with DoRA depends on the base model; see")
        note("tfimm_lora.combination_errors(..., model=model).")
    else:
        errors = combination_errors(combined, given, numbers)
    combined.save(out)
    ranks = sorted({update.rank for update in combined.layers.values()})
    finite = [error for error in errors.values() if error != float("inf")]
    data = {
        "out": str(out),
        "adapters": adapters,
        "weights": numbers or [1.0] * len(given),
        "method": method,
        "layers": len(combined.layers),
        "ranks": ranks,
        "bytes": combined.size,
        "largest_error": max(finite, default=None),
        "errors": {k: None if v == float("inf") else v for k, v in errors.items()},
    }
    emit(data, as_json, lambda: show(data))


def _adapter_index(text: str | None, count: int) -> int | str | None:
    """Convert ``--trained-whole`` for ``combine_adapters``, which counts from 0."""
    if text is None or text == "average":
        return text
    if text.isdecimal() and 1 <= int(text) <= count:
        return int(text) - 1
    raise ValueError(
        f"Received --trained-whole {text!r}; expected average, or the number of an adapter, "
        f"1 to {count}."
    )


def show(data: dict[str, Any]) -> None:
    """Print the properties of the combined adapter."""
    error = data["largest_error"]
    show_facts(
        [
            ("adapter", data["out"]),
            ("method", data["method"]),
            ("weights", ", ".join(f"{w:g}" for w in data["weights"])),
            ("layers", str(data["layers"])),
            ("rank", ", ".join(map(str, data["ranks"]))),
            ("size", byte_text(data["bytes"])),
            ("largest error of a layer", "-" if error is None else percent(error)),
        ]
    )
