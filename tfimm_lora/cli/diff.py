"""``tfimm-lora diff``: compare two adapters."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.combine_updates import norm_of_sum
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.cli.app import Json, app, emit
from tfimm_lora.cli.inspect import in_order, open_adapter
from tfimm_lora.cli.tables import show_table
from tfimm_lora.finetuning.report.formatting import decimal

EXAMPLES = """Examples:

tfimm-lora diff runs/first runs/second

tfimm-lora diff adapters/cats hf://user/repo --json
"""


@app.command("diff", epilog=EXAMPLES)
def diff_command(
    one: Annotated[str, typer.Argument(help="Folder of an adapter or run, or hf://user/repo.")],
    other: Annotated[str, typer.Argument(help="The one to compare it with.")],
    as_json: Json = False,
) -> None:
    """Compare the settings, layers and updates of two adapters.

    "distance" is the relative distance of two updates, |dW1 - dW2| / |dW1|.
    "cosine" is their cosine similarity: 1 for the same direction, 0 for
    orthogonal updates, -1 for opposite ones. The exit code is 0 whether the
    adapters differ or not.
    """
    data = compare(open_adapter(one), open_adapter(other))
    emit({"one": one, "other": other, **data}, as_json, lambda: show(data, one, other))


def compare(one: Adapter, other: Adapter) -> dict[str, Any]:
    """The differences between two adapters, as plain values for JSON.

    A distance or cosine is None where it is undefined: for updates of different shapes, or
    for a division by zero.
    """
    common = [path for path in in_order(one.layers) if path in other.layers]
    settings = {
        name: [_plain(getattr(x, name)) for x in (one, other)]
        for name in ("base_model", "bias", "dropout", "modules")
        if getattr(one, name) != getattr(other, name)
    }
    return {
        "identical": one == other,
        "settings": settings,
        "only_in_one": in_order(set(one.layers) - set(other.layers)),
        "only_in_other": in_order(set(other.layers) - set(one.layers)),
        "layers": [
            {"layer": path, **_layer_difference(one.layers[path], other.layers[path])}
            for path in common
        ],
        "whole": [
            {"name": key, **_array_difference(one.weights.get(key), other.weights.get(key))}
            for key in in_order({*one.weights, *other.weights})
        ],
    }


def _layer_difference(one: LayerUpdate, other: LayerUpdate) -> dict[str, Any]:
    both = (one, other)
    changed = {
        name: [_plain(getattr(x, name)) for x in both]
        for name in ("rank", "scale", "kind", "shape", "qkv")
        if getattr(one, name) != getattr(other, name)
    }
    distance = cosine = None
    if one.shape == other.shape:
        norms = [norm_of_sum([(x, 1.0)]) for x in both]
        difference = norm_of_sum([(one, 1.0), (other, -1.0)])
        distance = _quotient(difference, norms[0]) if difference or norms[0] else 0.0
        cosine = _quotient(_inner_product(one, other), norms[0] * norms[1])
    return {
        "identical": one == other,
        "changed": changed,
        "vectors": {
            name: _array_difference(getattr(one, name), getattr(other, name))
            for name in ("magnitude", "bias")
            if any(getattr(x, name) is not None for x in both)
        },
        "distance": distance,
        "cosine": None if cosine is None else max(-1.0, min(1.0, cosine)),
    }


def _inner_product(one: LayerUpdate, other: LayerUpdate) -> float:
    """The Frobenius inner product of two updates, computed from their factors."""
    (a, b), (c, d) = one.matrices(), other.matrices()
    return one.scale * other.scale * float(((b.T @ d) * (a @ c.T)).sum())


def _array_difference(one: np.ndarray | None, other: np.ndarray | None) -> dict[str, Any]:
    """The difference of a weight that is stored as an array, such as a fully trained one."""
    shapes = [None if x is None else list(x.shape) for x in (one, other)]
    if one is None or other is None or one.shape != other.shape:
        return {"identical": False, "shapes": shapes, "distance": None}
    difference = float(np.linalg.norm(one.astype("float64") - other))
    norm = float(np.linalg.norm(one.astype("float64")))
    same = one.dtype == other.dtype and np.array_equal(one, other)
    distance = _quotient(difference, norm) if difference or norm else 0.0
    return {"identical": same, "shapes": shapes, "distance": distance}


def _quotient(value: float, divisor: float) -> float | None:
    return value / divisor if divisor and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def show(data: dict[str, Any], one: str, other: str) -> None:
    """Print the result of ``compare``."""
    if data["identical"]:
        print(f"identical: {len(data['layers'])} layers, all values equal")
        return
    if data["settings"]:
        rows = [[name, *map(_text, pair)] for name, pair in data["settings"].items()]
        show_table(["setting", one, other], rows, left=(one, other))
        print()
    for key, name in (("only_in_one", one), ("only_in_other", other)):
        if data[key]:
            print(f"only in {name}: {len(data[key])} layers")
            print("".join(f"  {path}\n" for path in data[key]))
    if data["layers"]:
        rows = [[x["layer"], *_cells(x), _changes(x)] for x in data["layers"]]
        show_table(["layer", "distance", "cosine", "differs in"], rows, left=("differs in",))
    if data["whole"]:
        print()
        rows = [[x["name"], _cells(x)[0], _presence(x)] for x in data["whole"]]
        show_table(["full weight", "distance", "differs in"], rows, left=("differs in",))


def _cells(entry: dict[str, Any]) -> list[str]:
    if entry["identical"]:
        return ["same", "1.0000"]
    numbers = (entry["distance"], entry.get("cosine"))
    return ["-" if number is None else decimal(number) for number in numbers]


def _changes(layer: dict[str, Any]) -> str:
    changes = [
        f"{name} {_text(old)} -> {_text(new)}" for name, (old, new) in layer["changed"].items()
    ]
    for name, vector in layer["vectors"].items():
        where, distance = _presence(vector), vector["distance"]
        if where or not vector["identical"]:
            changes.append(f"{name} {where or f'by {decimal(distance)}'}")
    return ", ".join(changes)


def _presence(weight: dict[str, Any]) -> str:
    first, second = weight["shapes"]
    if first is None or second is None:
        return "only in the " + ("second" if first is None else "first")
    return "" if first == second else f"shape {_text(first)} -> {_text(second)}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value in (None, "") else str(value)
