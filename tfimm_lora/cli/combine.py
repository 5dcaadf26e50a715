"""``tfimm-lora combine``: one adapter from several."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

from tfimm_lora.adapters.combine import combination_errors, combine_adapters
from tfimm_lora.adapters.combine_updates import COMBINATION_TYPES
from tfimm_lora.cli.app import Json, app, emit, note, typer
from tfimm_lora.cli.inspect import open_adapter
from tfimm_lora.cli.outputs import Overwrite, refuse_to_overwrite
from tfimm_lora.cli.tables import byte_text, show_facts

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
        str | None, typer.Option(help="A number for each, as 0.5,0.5; default 1 for each.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that stay, for ties and dare.")
    ] = None,
    majority_sign: Annotated[str, typer.Option(help="For ties: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="For dare.")] = 0,
    trained_whole: Annotated[
        str | None,
        typer.Option(
            help="Classifier and biases: average, or the number of the adapter, 1 for the "
            "first, that keeps its own. Needed where they differ."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Name of the model, where the adapters' names differ.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make one adapter that does what several do together, each with a weight.

    "cat" gives the sum exactly, at the sum of the ranks; "svd" the nearest to it
    of a given --rank. The others prune and mix, as in TIES and DARE.
    """
    refuse_to_overwrite(out, overwrite)
    given = [open_adapter(address) for address in adapters]
    if base_model is not None:
        given = [dataclasses.replace(x, base_model=base_model) for x in given]
    numbers = None if weights is None else parse_weights(weights)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        combined = combine_adapters(
            given,
            numbers,
            method,
            rank=rank,
            density=density,
            majority_sign_method=majority_sign,
            seed=seed,
            trained_whole=_choice(trained_whole, len(given)),
        )
    for warning in told:
        note(f"warning: {warning.message}")
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


def parse_weights(text: str) -> list[float]:
    """The numbers in "0.5,-1".

    Raises:
        ValueError: for anything else.
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"Received --weights {text!r}; expected numbers with commas between, one for each "
            "adapter, as 0.5,-1."
        ) from error


def _choice(text: str | None, count: int) -> int | str | None:
    """``trained_whole`` of ``combine_adapters``, which counts from 0."""
    if text is None or text == "average":
        return text
    if text.isdecimal() and 1 <= int(text) <= count:
        return int(text) - 1
    raise ValueError(
        f"Received --trained-whole {text!r}; expected average, or the number of one of the "
        f"adapters, 1 to {count}."
    )


def show(data: dict[str, Any]) -> None:
    """Print what was made."""
    error = data["largest_error"]
    show_facts(
        [
            ("adapter", data["out"]),
            ("method", data["method"]),
            ("weights", ", ".join(f"{w:g}" for w in data["weights"])),
            ("layers", str(data["layers"])),
            ("rank", ", ".join(map(str, data["ranks"]))),
            ("size", byte_text(data["bytes"])),
            ("farthest layer from the sum", "-" if error is None else f"{100 * error:.2g} %"),
        ]
    )
