"""What ``--model`` may be: names of models as people type them, and files.

Nothing here imports TensorFlow, so that a wrong name is reported at once.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tfimm_lora.backend import uses_legacy_keras
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.zoo.keras3_models.folders import PRESETS, folder_kind
from tfimm_lora.zoo.keras3_models.known import is_known as is_known_on_keras3
from tfimm_lora.zoo.keras3_models.presets import HUB, is_preset
from tfimm_lora.zoo.model_table import (
    KnownModel,
    applications_table,
    keras3_models,
    tfimm_models,
)
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS

#: The prefix of the names of ``keras.applications``.
APPLICATIONS = "applications/"

#: The prefix of a timm checkpoint other than the one that the name of a tfimm model stands for.
TIMM = "timm/"

_APPLICATIONS = re.compile(r"(tf\.)?(keras[./])?applications[./]", re.IGNORECASE)
_HUB = re.compile(r"(hf[-_]hub|hf):(//)?", re.IGNORECASE)
_SUFFIXES = (".keras", ".h5", ".hdf5")


def is_model_file(name: str) -> bool:
    """Whether ``--model`` is the path of a saved model, and not the name of a model.

    A folder that has the name of a model by coincidence, such as the folder of a run, does not
    hide that model: only a SavedModel and a folder that keras_hub reads count.
    """
    if name.startswith(HUB) and not os.path.exists(name):
        return False
    if _HUB.match(name) or name.lower().startswith(TIMM) or _APPLICATIONS.match(name):
        return os.path.isfile(name)
    if name.lower().endswith(_SUFFIXES) or os.sep in name or os.path.isfile(name):
        return True
    return (Path(name) / "saved_model.pb").exists() or folder_kind(name) in PRESETS


def canonical_name(name: str) -> str:
    """The name of a model as the package spells it.

    Args:
        name: A name as typed: of a tfimm model, of a model of ``keras.applications`` with or
            without "applications/", or of a timm checkpoint ("resnet50.a1_in1k", "timm/...",
            "hf-hub:timm/..."), in any case, with "-" or "_".

    Returns:
        A tfimm name, "applications/NAME", or "timm/ARCHITECTURE.TAG" for a checkpoint that is
        not the one of a tfimm name. Anything else, such as a path, is returned unchanged.

    Example:
        >>> from tfimm_lora.finetuning.base.names import canonical_name
        >>> [canonical_name(x) for x in ("MobileNetV2", "ConvNeXt-Tiny", "my.keras")]
        ['applications/MobileNetV2', 'convnext_tiny', 'my.keras']
        >>> canonical_name("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k")
        'vit_tiny_patch16_224'
    """
    if is_model_file(name) or _is_registered(name):
        return name
    prefix = _APPLICATIONS.match(name)
    if prefix:
        found = _spelled(name[prefix.end() :], applications_table())
        return APPLICATIONS + found if found else name
    without_hub = _hub_name(name)
    if without_hub.lower().startswith(TIMM):
        return _timm_name(without_hub[len(TIMM) :]) or name
    if without_hub != name:  # another repository of the hub
        return name
    return _bare_name(name) or _timm_name(name) or name


def _hub_name(name: str) -> str:
    """A name without "hf-hub:"."""
    return _HUB.sub("", name)


def _is_registered(name: str) -> bool:
    """Whether a user has registered a model of this name in tfimm."""
    tfimm = sys.modules.get("tfimm")
    models = getattr(tfimm, "models", None)
    return models is not None and bool(models.is_model(name))


def _bare_name(name: str) -> str | None:
    """Find a name without prefix in both libraries, the most exact spelling first."""
    tables = ((tfimm_models(), ""), (applications_table(), APPLICATIONS), (_of_timm(), ""))
    for key in (str, str.lower, _letters):
        for known, prefix in tables:
            found = _unique(key(name), known, key)
            if found:
                return prefix + found
    return None


def _of_timm() -> dict[str, KnownModel]:
    """The models that tfimm does not have and Keras 3 builds; none on legacy Keras."""
    if uses_legacy_keras():
        return {}
    return {k: model for k, model in keras3_models().items() if k not in tfimm_models()}


def _named() -> dict[str, KnownModel]:
    """The models without a prefix. Later ones replace earlier ones of a similar name."""
    return {**_of_timm(), **tfimm_models()}


def _spelled(name: str, known: Iterable[str]) -> str | None:
    for key in (str, str.lower, _letters):
        found = _unique(key(name), known, key)
        if found:
            return found
    return None


def _unique(name: str, known: Iterable[str], key: Callable[[str], str]) -> str | None:
    found = [other for other in known if key(other) == name]
    return found[0] if len(found) == 1 else None


def _letters(name: str) -> str:
    """A name without case and separators."""
    return re.sub(r"[-_ ]", "", name.lower())


def _timm_name(name: str) -> str | None:
    """The canonical name of a timm checkpoint, ARCHITECTURE.TAG, or of an architecture."""
    for ours, checkpoint in CHECKPOINTS.items():
        if checkpoint.lower() == name.lower():
            return ours
    architecture, dot, tag = name.partition(".")
    if not dot:
        return _unique(name.lower(), _named(), str.lower)
    known = tfimm_architecture(architecture) or _is_built(name)
    return f"{TIMM}{architecture}.{tag}" if known else None


def _is_built(name: str) -> bool:
    """Whether this process builds a model of timm without tfimm."""
    return not uses_legacy_keras() and is_known_on_keras3(name)


def tfimm_architecture(architecture: str) -> str | None:
    """The tfimm name of an architecture of timm, or None.

    Example:
        >>> from tfimm_lora.finetuning.base.names import tfimm_architecture
        >>> tfimm_architecture("convnext_tiny"), tfimm_architecture("eva02_base")
        ('convnext_tiny', None)
    """
    if architecture in tfimm_models():
        return architecture
    of_timm = {checkpoint.partition(".")[0]: name for name, checkpoint in CHECKPOINTS.items()}
    return of_timm.get(architecture)


def is_known(name: str) -> bool:
    """Whether a canonical name is a model of one of the tables."""
    if name.startswith(APPLICATIONS):
        return name[len(APPLICATIONS) :] in applications_table()
    if _is_built(name) or (not uses_legacy_keras() and is_preset(name)):
        return True
    if name.startswith(TIMM):
        return tfimm_architecture(name[len(TIMM) :].partition(".")[0]) is not None
    return name in tfimm_models()


def same_application(name: str) -> str | None:
    """The model of ``keras.applications`` with the name of a tfimm model, or None.

    Example:
        >>> from tfimm_lora.finetuning.base.names import same_application
        >>> same_application("resnet50")
        'applications/ResNet50'
    """
    found = _unique(_letters(name), applications_table(), _letters)
    return APPLICATIONS + found if found else None


def unknown_model(name: str) -> ValueError:
    """The error for a name that is not known, with the most similar names of both libraries."""
    plain = _letters(
        _APPLICATIONS.sub("", _hub_name(name)).removeprefix(TIMM).partition(".")[0]
    )
    near = []
    for known, prefix in ((applications_table(), APPLICATIONS), (_named(), "")):
        spelled = {_letters(other): prefix + other for other in known}
        near += [spelled[other] for other in close_names(plain, spelled, 3, similarity=0.6)]
    only_tfimm = [x for x in near if x in tfimm_models() and not is_known_on_keras3(x)]
    is_hub_id = name != _hub_name(name) or name.lower().startswith(TIMM)
    return ValueError(
        f"Received model {name!r}; expected the name of a model of tfimm or Keras "
        "Applications, a preset of keras_hub (hub/NAME), or the path of a saved Keras model. "
        + (f"Most similar: {', '.join(near)}. " if near else "")
        + (
            f"{', '.join(only_tfimm)}: only with tfimm and TF_USE_LEGACY_KERAS=1. "
            if only_tfimm and not uses_legacy_keras()
            else ""
        )
        + (
            "From the hub, only timm's checkpoints of tfimm's architectures can be loaded. "
            if is_hub_id
            else ""
        )
        + "tfimm-lora models lists all names."
    )
