"""``tfimm-lora models``: the models that have a name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import json
from collections.abc import Iterable
from importlib import resources
from typing import Annotated, Any

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.cli.app import Json, app, emit, note, typer
from tfimm_lora.cli.tables import show_table
from tfimm_lora.config import Targets
from tfimm_lora.create import list_models
from tfimm_lora.finetuning.open_model import APPLICATIONS, applications
from tfimm_lora.model.registry import lora_config
from tfimm_lora.zoo.tfimm_models import import_tfimm

EXAMPLES = """Examples:

tfimm-lora models

tfimm-lora models convnext

tfimm-lora models "vit_*_224" --json
"""


@app.command("models", epilog=EXAMPLES)
def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a whole name with * and ?.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the models that have a name: those of tfimm and of keras.applications.

    Each with its family, its parameters, the size of its pictures and the layers
    that LoRA adapts by default. The models of tfimm are there on legacy Keras
    only (TF_USE_LEGACY_KERAS=1).
    """
    known = known_models()
    found = matching(pattern, list(known))
    data = [{"name": name, **known[name]()} for name in found]
    emit(data, as_json, lambda: show(data))
    if not as_json:
        note(f"{len(found)} of {len(known)} models")


def known_models() -> dict[str, Any]:
    """Name -> a function that tells more, for all models that this process can make."""
    models: dict[str, Any] = {}
    if installed("tfimm") and uses_legacy_keras():
        tfimm = import_tfimm()
        models = {name: functools.partial(_of_tfimm, tfimm, name) for name in list_models()}
    for name, create in applications().items():
        models[APPLICATIONS + name] = functools.partial(_of_applications, name, create)
    return models


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that a pattern means, without regard to the case of letters.

    Raises:
        ValueError: if there are none; the nearest are named.

    Example:
        >>> matching("net50", ["resnet50", "vit_tiny"]), matching("vit_?iny", ["vit_tiny"])
        (['resnet50'], ['vit_tiny'])
    """
    found = _found(pattern, names)
    if found:
        return found
    plain = pattern.lower().strip("*").replace("*", "_")
    lowered = {name.lower().removeprefix(APPLICATIONS): name for name in names}
    near = difflib.get_close_matches(plain.removeprefix(APPLICATIONS), lowered, n=5, cutoff=0.3)
    raise ValueError(
        f"Received PATTERN {pattern!r}, which matches none of {len(names)} names. "
        + (f"Nearest: {', '.join(lowered[n] for n in near)}. " if near else "")
        + _elsewhere(pattern)
        + "Part of a name will do; without PATTERN all are listed."
    )


def _found(pattern: str, names: Iterable[str]) -> list[str]:
    wanted = pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return [name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)]
    return [name for name in names if wanted in name.lower()]


def _elsewhere(pattern: str) -> str:
    """What to do for models that only another process could make."""
    if uses_legacy_keras() or not _found(pattern, sizes()["tfimm"]):
        return ""
    return "tfimm has such names: it needs TF_USE_LEGACY_KERAS=1, where it is installed. "


@functools.cache
def sizes() -> dict[str, Any]:
    """Parameters by name, counted on built models by tools/make_architectures.py.

    All 285 models of tfimm take forty minutes to build, so they are not built for a list.
    """
    text = resources.files("tfimm_lora.cli").joinpath("sizes.json").read_text()
    return json.loads(text)


def _of_tfimm(tfimm: Any, name: str) -> dict[str, Any]:
    cls, cfg = tfimm.models.model_class(name), tfimm.models.model_config(name)
    targets: Targets = lora_config(cls).presets()["default"]  # type: ignore[attr-defined]
    return {
        "library": "tfimm",
        "family": cls.__name__,
        "parameters": sizes()["tfimm"].get(name),
        "input_size": list(cfg.input_size),
        "targets": targets if targets is None or isinstance(targets, str) else list(targets),
    }


def _of_applications(name: str, create: Any) -> dict[str, Any]:
    # A function of Keras, whose module is called after the family.
    family = inspect.unwrap(create).__module__.rpartition(".")[2]
    parameters, *size = sizes()["applications"].get(name, [None, None, None])
    return {
        "library": "keras.applications",
        "family": family,
        "parameters": parameters,
        "input_size": size,
        "targets": None,
    }


def show(models: list[dict[str, Any]]) -> None:
    """Print a table of models."""
    rows = [
        [
            x["name"],
            x["family"],
            "?" if x["parameters"] is None else f"{x['parameters'] / 1e6:,.1f} M",
            "any" if None in x["input_size"] else "x".join(map(str, x["input_size"])),
            _targets_text(x["targets"]),
        ]
        for x in models
    ]
    headers = ["name", "family", "parameters", "pictures", "adapted by default"]
    show_table(headers, rows, left=("family", "adapted by default"))


def _targets_text(targets: Targets) -> str:
    if targets is None:
        return "all layers but the classifier"
    return targets if isinstance(targets, str) else " ".join(targets)
