"""Checks of the model of a recipe that need neither TensorFlow nor the model itself."""

from __future__ import annotations

import os
import sys
from typing import Any

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.finetuning.base.downloads import no_pretrained_weights
from tfimm_lora.finetuning.base.keras_files import check_saved_by
from tfimm_lora.finetuning.base.names import (
    APPLICATIONS,
    canonical_name,
    is_known,
    is_model_file,
    same_application,
    unknown_model,
)
from tfimm_lora.zoo.keras3_models.folders import PRESETS, folder_kind
from tfimm_lora.zoo.keras3_models.known import is_known as is_known_on_keras3
from tfimm_lora.zoo.keras3_models.known import known, refusal_reason
from tfimm_lora.zoo.keras3_models.presets import HUB, is_preset
from tfimm_lora.zoo.keras3_models.sources import find_source
from tfimm_lora.zoo.model_table import applications_table
from tfimm_lora.zoo.tfimm_models import import_tfimm
from tfimm_lora.zoo.weights.hub_ids import WITHOUT_WEIGHTS


def check_model(name: str, *, pretrained: bool = False, weights: Any = None) -> None:
    """Raise an error for a model that cannot be opened, as far as this shows without it.

    Args:
        name, pretrained, weights: As for ``open_base_model``.

    Raises:
        ValueError, FileNotFoundError, ImportError, RuntimeError: as ``open_base_model``.
    """
    name = canonical_name(name)
    if weights is not None and not os.path.exists(weights):
        raise FileNotFoundError(
            f"Received weights={os.fspath(weights)!r}, which does not exist; expected a weight "
            "file."
        )
    if is_model_file(name):
        check_file(name)
    elif is_preset(name) and (name.startswith(HUB) or not uses_legacy_keras()):
        check_preset(name)
    elif not is_known(name):
        # Once tfimm is imported, it may have models of the user, too.
        if name.startswith(APPLICATIONS) or "tfimm" not in sys.modules:
            raise unknown_model(name)
    elif name.startswith(APPLICATIONS):
        if (
            not uses_legacy_keras()
            and not applications_table()[name[len(APPLICATIONS) :]].in_keras3
        ):
            raise not_in_keras3(name)
    else:
        check_tfimm(name)
        if pretrained and weights is None and name in WITHOUT_WEIGHTS and not _is_cached(name):
            raise no_pretrained_weights(name, WITHOUT_WEIGHTS[name])


def check_file(path: str) -> None:
    """Raise an error for a model file that does not exist or needs something else to load."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"Received model {path!r}, which does not exist; expected a saved Keras model, or "
            "the name of a model. tfimm-lora models lists the names."
        )
    if folder_kind(path) in PRESETS:
        check_preset(path)
    check_saved_by(path)


def check_preset(name: str) -> None:
    """Raise an error for a model of keras_hub if keras_hub cannot be used here."""
    if uses_legacy_keras():
        raise RuntimeError(
            f"{name} is a model for keras_hub, which needs Keras 3, but this process uses "
            "legacy Keras. Set the environment variable TF_USE_LEGACY_KERAS=0."
        )
    source = find_source(name, download=False)
    if source is None or source.model.needs_keras_hub:
        _require_keras_hub(name)


def _require_keras_hub(name: str) -> None:
    if not installed("keras_hub"):
        raise ImportError(
            f"The model {name} needs keras_hub, which is not installed: pip install "
            '"tfimm_lora[hub]", or pip install keras-hub.'
        )


def check_tfimm(name: str) -> None:
    """Raise an error for a model of tfimm or timm that cannot be created here."""
    if not uses_legacy_keras() and is_known_on_keras3(name):
        if known(name).needs_keras_hub:
            _require_keras_hub(name)
        return
    if installed("tfimm") and uses_legacy_keras():
        return
    reason = None if uses_legacy_keras() else refusal_reason(name)
    same = same_application(name)
    remedy = f" Keras Applications has a similar model: {same}." if same else ""
    try:
        import_tfimm()
    except (ImportError, RuntimeError) as error:
        why = f", which Keras 3 cannot build exactly: {reason}" if reason else ""
        raise type(error)(f"{name} is a model of tfimm{why}. {error}{remedy}") from error


def not_in_keras3(name: str) -> ValueError:
    """The error for a model of ``keras.applications`` that only legacy Keras has."""
    return ValueError(
        f"Received model {name!r}, which Keras 3 does not have. Set the environment variable "
        "TF_USE_LEGACY_KERAS=1 to use legacy Keras (tf_keras), which has it."
    )


def _is_cached(name: str) -> bool:
    """Whether a model of this name is in tfimm's own cache."""
    tfimm = sys.modules.get("tfimm")
    if tfimm is not None and hasattr(tfimm, "utils"):
        return bool(tfimm.utils.cached_model_path(name))
    home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folder = os.environ.get("TFIMM_HOME", os.path.join(home, "tfimm"))
    return os.path.exists(os.path.join(os.path.expanduser(folder), name))
