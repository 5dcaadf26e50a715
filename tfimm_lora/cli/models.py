"""``tfimm-lora models``: list the models that can be created by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.cli.app import Json, app, emit, note
from tfimm_lora.cli.tables import show_table
from tfimm_lora.config import Targets
from tfimm_lora.finetuning.base.names import APPLICATIONS
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.zoo.keras3_models.known import is_known, known
from tfimm_lora.zoo.model_table import (
    KnownModel,
    applications_table,
    keras3_models,
    tfimm_models,
)

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
    """List the models that can be created by name.

    For each model: its family, number of parameters, input size, whether it has
    pretrained weights, and the layers that LoRA adapts by default. With
    legacy Keras these are the models of tfimm and Keras Applications. With Keras 3
    they are those of timm that keras_hub and Keras Applications build.
    """
    known = known_models()
    found = matching(pattern, list(known))
    data = [{"name": name, **_described(name, known[name])} for name in found]
    emit(data, as_json, lambda: show(data))
    if not as_json:
        note(f"{len(found)} of {len(known)} models")


def known_models() -> dict[str, KnownModel]:
    """The models that can be created in this process, by name."""
    legacy = uses_legacy_keras()
    if legacy:
        models = dict(tfimm_models()) if installed("tfimm") else {}
    else:
        hub = installed("keras_hub")
        models = {
            n: m for n, m in keras3_models().items() if hub or not known(n).needs_keras_hub
        }
    for name, model in applications_table().items():
        if legacy or model.in_keras3:
            models[APPLICATIONS + name] = model
    return models


def _described(name: str, model: KnownModel) -> dict[str, Any]:
    return {
        "library": _library(name),
        "family": model.family,
        "parameters": model.parameters,
        "input_size": list(model.input_size),
        "targets": model.targets,
        "pretrained": model.pretrained,
    }


def _library(name: str) -> str:
    if name.startswith(APPLICATIONS):
        return "keras.applications"
    if uses_legacy_keras():
        return "tfimm"
    return "keras_hub" if known(name).needs_keras_hub else "keras.applications"


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
    others = [name for name in tfimm_models() if not is_known(name)]
    if uses_legacy_keras() or not _matches(pattern, others):
        return ""
    return "tfimm has such models; they need tfimm and TF_USE_LEGACY_KERAS=1. "


def show(models: list[dict[str, Any]]) -> None:
    """Print a table of models."""
    rows = [
        [
            x["name"],
            x["family"],
            "?" if x["parameters"] is None else f"{x['parameters'] / 1e6:,.1f} M",
            "any" if None in x["input_size"] else "x".join(map(str, x["input_size"])),
            "yes" if x["pretrained"] else "no",
            _targets_text(x["targets"]),
        ]
        for x in models
    ]
    headers = ["name", "family", "parameters", "input size", "pretrained", "adapted by default"]
    show_table(headers, rows, left=("family", "adapted by default"))


def _targets_text(targets: Targets) -> str:
    if targets is None:
        return "all layers except the classifier"
    return targets if isinstance(targets, str) else " ".join(targets)
