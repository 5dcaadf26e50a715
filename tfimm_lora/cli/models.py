"""``tfimm-lora models``: list the models that can be created by name."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import json
from collections.abc import Iterable
from importlib import resources
from typing import Annotated, Any

import typer

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.cli.app import Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.tables import show_table
from tfimm_lora.config import Targets
from tfimm_lora.create import list_models
from tfimm_lora.finetuning.base_model import APPLICATIONS, applications
from tfimm_lora.model.registry import lora_config
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.zoo.tfimm_models import import_tfimm

EXAMPLES = """Examples:

tfimm-lora models

tfimm-lora models convnext

tfimm-lora models "vit_*_224" --json
"""


@app.command("models", epilog=EXAMPLES)
def models_command(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a pattern with * and ?.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the models of tfimm and Keras Applications.

    For each model: its family, number of parameters, input size and the layers
    that LoRA adapts by default. The models of tfimm need legacy Keras
    (TF_USE_LEGACY_KERAS=1).
    """
    import_tensorflow()
    known = known_models()
    found = matching(pattern, list(known))
    data = [{"name": name, **known[name]()} for name in found]
    emit(data, as_json, lambda: show(data))
    if not as_json:
        note(f"{len(found)} of {len(known)} models")


def known_models() -> dict[str, Any]:
    """The models that can be created in this process, each with a function to describe it."""
    models: dict[str, Any] = {}
    if installed("tfimm") and uses_legacy_keras():
        tfimm = import_tfimm()
        models = {name: functools.partial(_of_tfimm, tfimm, name) for name in list_models()}
    for name, create in applications().items():
        models[APPLICATIONS + name] = functools.partial(_of_applications, name, create)
    return models


def matching(pattern: str, names: list[str]) -> list[str]:
    """The names that match a pattern, ignoring case.

    Raises:
        ValueError: if there are none. The message lists the most similar names.

    Example:
        >>> matching("net50", ["resnet50", "vit_tiny"]), matching("vit_?iny", ["vit_tiny"])
        (['resnet50'], ['vit_tiny'])
    """
    found = _matches(pattern, names)
    if found:
        return found
    plain = pattern.lower().strip("*").replace("*", "_")
    lowered = {name.lower().removeprefix(APPLICATIONS): name for name in names}
    near = close_names(plain.removeprefix(APPLICATIONS), lowered, similarity=0.3)
    raise ValueError(
        f"Received PATTERN {pattern!r}, which matches none of {len(names)} names; expected "
        "part of a name, or a pattern with * and ?. "
        + (f"Most similar: {', '.join(lowered[n] for n in near)}. " if near else "")
        + _legacy_hint(pattern)
        + "Leave PATTERN out to list all models."
    )


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    lowered = pattern.lower()
    if any(character in pattern for character in "*?["):
        return [name for name in names if fnmatch.fnmatchcase(name.lower(), lowered)]
    return [name for name in names if lowered in name.lower()]


def _legacy_hint(pattern: str) -> str:
    """A hint for names that exist in tfimm, if this process uses Keras 3."""
    if uses_legacy_keras() or not _matches(pattern, sizes()["tfimm"]):
        return ""
    return "tfimm has such models; they need tfimm and TF_USE_LEGACY_KERAS=1. "


@functools.cache
def sizes() -> dict[str, Any]:
    """Numbers of parameters by name, counted by tools/make_architectures.py.

    They are stored because building all 285 models of tfimm takes forty minutes.
    """
    text = resources.files("tfimm_lora.cli").joinpath("sizes.json").read_text()
    read: dict[str, Any] = json.loads(text)
    return read


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
    # The module of a function of Keras Applications is named after the family.
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
    headers = ["name", "family", "parameters", "input size", "adapted by default"]
    show_table(headers, rows, left=("family", "adapted by default"))


def _targets_text(targets: Targets) -> str:
    if targets is None:
        return "all layers except the classifier"
    return targets if isinstance(targets, str) else " ".join(targets)
