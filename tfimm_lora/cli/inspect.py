"""``tfimm-lora inspect``: show the layers and spectra of an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.summary import effective_rank
from tfimm_lora.cli.app import Json, app, emit, note
from tfimm_lora.cli.outputs import Overwrite, new_file
from tfimm_lora.cli.tables import show_facts, show_table
from tfimm_lora.families.recognize import Naming, recognize_surely
from tfimm_lora.finetuning.report.formatting import byte_text

EXAMPLES = """Examples:

tfimm-lora inspect runs/flowers/adapter

tfimm-lora inspect hf://user/repo --plot adapter.png

tfimm-lora inspect runs/flowers --json
"""

#: A share of the energy of an update, which is the sum of its squared singular values.
ENERGY = 0.9


@app.command("inspect", epilog=EXAMPLES)
def inspect_command(
    adapter: Annotated[
        str, typer.Argument(help="Folder of an adapter or of a run, or hf://user/repo.")
    ],
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw norms and spectra of all layers to this .png, .svg or .pdf."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Show the layers of an adapter, with the norm and spectrum of each update.

    The update of a layer is dW = scale * B A. "norm" is its Frobenius norm,
    "largest" its largest singular value. Two numbers measure how much of the
    rank is used: "eff. rank", the effective rank, is the exponential of the
    entropy of the singular values; "90 %" is the number of singular values that
    make up 90 % of the energy. "names" is the library whose names the layers
    have, and the family of the model.
    """
    if overwrite and plot is None:
        raise typer.BadParameter("--overwrite needs --plot.")
    value = open_adapter(adapter)
    data = describe(value)
    if plot is not None:
        from tfimm_lora.cli.spectrum_plot import draw, require_suffix

        require_suffix(plot)
        with new_file(plot, overwrite) as path:
            draw(data["layers"], path, title=data["base_model"] or adapter)
        note(f"drawn: {plot}")
    emit({"adapter": adapter, **data}, as_json, lambda: show(data))


def open_adapter(address: str) -> Adapter:
    """Load the adapter in a folder, in the folder of a run, or on the Hugging Face Hub.

    Raises:
        FileNotFoundError, ValueError, ImportError: as ``Adapter.load``.
    """
    inside = Path(address) / "adapter"
    is_run = inside.is_dir() and not (Path(address) / "adapter_config.json").exists()
    return Adapter.load(str(inside) if is_run else address)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names naturally, with the numbers in them compared by value.

    Example:
        >>> in_order(["blocks.10.fc", "blocks.2.fc"])
        ['blocks.2.fc', 'blocks.10.fc']
    """

    def parts(name: str) -> list[Any]:
        return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)]

    return sorted(names, key=parts)


def describe(adapter: Adapter) -> dict[str, Any]:
    """The properties of an adapter as plain values, for JSON."""
    paths, keys = in_order(adapter.layers), in_order(adapter.weights)
    layers = [{"layer": path, **_numbers(adapter.layers[path])} for path in paths]
    whole = [
        {"name": key, "shape": list(value.shape), "parameters": value.size}
        for key, value in ((key, adapter.weights[key]) for key in keys)
    ]
    return {
        "base_model": adapter.base_model,
        "names": naming_facts(recognize_surely(paths, hint=adapter.base_model)),
        "bias": adapter.bias,
        "dropout": adapter.dropout,
        "use_dora": adapter.use_dora,
        "use_loha": adapter.use_loha,
        "lora_bias": adapter.branch_bias,
        "modules": list(adapter.modules),
        "not_in_peft": adapter.not_in_peft(),
        "layers": layers,
        "whole": whole,
        "totals": {
            "layers": len(layers),
            "factors": sum(layer["parameters"] for layer in layers),
            "whole": sum(weight["parameters"] for weight in whole),
            "bytes": adapter.size,
            "norm": float(np.linalg.norm([layer["norm"] for layer in layers])),
        },
    }


def naming_facts(naming: Naming | None) -> dict[str, Any] | None:
    """Whose names an adapter uses as plain values, for JSON; None if they are not known."""
    if naming is None:
        return None
    return {
        "library": naming.libraries_name,
        "dialect": naming.dialect,
        "family": naming.family.name,
        "prefix": naming.prefix,
        "description": str(naming),
    }


def _numbers(update: LayerUpdate) -> dict[str, Any]:
    # Computed from the factors, since the update itself is as large as the kernel.
    values = update.singular_values()
    energy = np.cumsum(values**2)
    return {
        "kind": update.kind,
        "parts": list(update.qkv) if update.qkv else None,
        "shape": list(update.shape),
        "rank": update.rank,
        "alpha": update.alpha,
        "scale": update.scale,
        "parameters": update.size,
        "norm": float(np.sqrt(energy[-1])),
        "largest": float(values[0]),
        "effective_rank": effective_rank(values),
        "rank_of_90_percent": int(np.searchsorted(energy, ENERGY * energy[-1]) + 1)
        if energy[-1]
        else 0,
        "singular_values": values.tolist(),
    }


def show(data: dict[str, Any]) -> None:
    """Print the result of ``describe``."""
    totals = data["totals"]
    rows = [
        [
            x["layer"],
            x["kind"] if not x["parts"] else f"{x['kind']}, {x['parts'][0]} of {x['parts'][1]}",
            "x".join(map(str, x["shape"])),
            str(x["rank"]),
            f"{x['scale']:.4g}",
            f"{x['parameters']:,}",
            f"{x['norm']:.4g}",
            f"{x['largest']:.4g}",
            f"{x['effective_rank']:.2f}",
            str(x["rank_of_90_percent"]),
        ]
        for x in data["layers"]
    ]
    headers = ["layer", "kind", "shape", "rank", "scale", "parameters", "norm"]
    show_table([*headers, "largest", "eff. rank", "90 %"], rows, left=("kind",))
    if data["whole"]:
        print()
        stored = [
            [x["name"], "x".join(map(str, x["shape"])), f"{x['parameters']:,}"]
            for x in data["whole"]
        ]
        show_table(["full weight", "shape", "parameters"], stored)
    print()
    not_in_peft = len(data["not_in_peft"])
    show_facts(
        [
            ("base model", data["base_model"] or "unknown"),
            ("names", data["names"]["description"] if data["names"] else "of no known family"),
            ("layers", str(totals["layers"])),
            ("parameters of the factors", f"{totals['factors']:,}"),
            ("parameters of full weights", f"{totals['whole']:,}"),
            ("size of all arrays", f"{totals['bytes']:,} bytes ({byte_text(totals['bytes'])})"),
            ("norm of all updates", f"{totals['norm']:.4g}"),
            ("fully trained modules", ", ".join(data["modules"]) or "none"),
            ("trained biases", data["bias"]),
            ("dropout", f"{data['dropout']:g}"),
            ("DoRA", "yes" if data["use_dora"] else "no"),
            ("LoHa", "yes" if data["use_loha"] else "no"),
            ("bias of the branches", "yes" if data["lora_bias"] else "no"),
            (
                "PEFT format",
                f"no: PEFT cannot express {not_in_peft} layers or weights"
                if not_in_peft
                else "yes",
            ),
        ]
    )
