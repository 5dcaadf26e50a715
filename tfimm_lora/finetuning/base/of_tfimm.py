"""Open a model of tfimm, with its pretrained weights, those of a checkpoint, or random ones."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.finetuning.base.downloads import downloading, no_pretrained_weights
from tfimm_lora.finetuning.base.early import check_tfimm
from tfimm_lora.finetuning.base.names import (
    TIMM,
    is_known,
    tfimm_architecture,
    unknown_model,
)
from tfimm_lora.finetuning.base.opened import BaseModel, Size
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.state import base_name, random_weights, record_base_name
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.tfimm_models import import_tfimm
from tfimm_lora.zoo.weights.checkpoint import Checkpoint, find_checkpoint, is_checkpoint
from tfimm_lora.zoo.weights.hub_ids import WITHOUT_WEIGHTS, hub_id
from tfimm_lora.zoo.weights.pretrained import create_from_file, create_pretrained

_CACHE = (
    "They are downloaded once: start the command with a connection to the hub (HF_ENDPOINT), "
    "or copy the cache of another machine and set HF_HOME."
)


def open_tfimm(
    name: str,
    classes: int | None,
    pretrained: bool,
    weights: Any,
    input_size: Size,
    dense: bool = False,
) -> BaseModel:
    """Create a model of tfimm; see ``open_base_model``.

    Args:
        name: A tfimm name, or "timm/ARCHITECTURE.TAG" for another checkpoint of timm.
        classes, pretrained, weights, input_size: As for ``open_base_model``.
        dense: Whether a model without a classifier (Segment Anything) is opened, too.
    """
    if is_known(name):
        check_tfimm(name)
    elif not (installed("tfimm") and uses_legacy_keras()):
        raise unknown_model(name)
    tfimm = import_tfimm()
    tag = name if name.startswith(TIMM) else None
    if tag:
        name = str(tfimm_architecture(tag[len(TIMM) :].partition(".")[0]))
    if not tfimm.models.is_model(name):
        raise unknown_model(name)
    default = _classes_of(tfimm.models.model_config(name))
    if default is None and not dense:
        raise ValueError(
            f"Received model {name!r}, which has no classifier; expected a classification "
            "model. Use it for --task segmentation, or lora.create_model to train it on its "
            "own task."
        )
    requested: dict[str, Any] = {"nb_classes": classes, "input_size": input_size}
    requested = {key: value for key, value in requested.items() if value is not None}
    if weights is not None:
        model, default = _from_checkpoint(tfimm, name, _local(name, weights), requested)
        text = f"weights of {os.path.basename(os.path.abspath(weights))}"
        record_base_name(model, os.path.basename(os.path.abspath(weights)))
    elif pretrained and tag:
        with downloading(tag, _CACHE):
            checkpoint = find_checkpoint(tag, None, None)
        model, default = _from_checkpoint(tfimm, name, checkpoint, requested)
        text = f"pretrained weights {tag}"
        record_base_name(model, tag)
    elif pretrained:
        model = _pretrained(tfimm, name, requested)
        text = f"pretrained weights {base_name(model) or name}"
    else:
        model = tfimm.create_model(name, **requested)
        text = "random weights"
        record_base_name(model, random_weights(name))
    return BaseModel(
        model,
        Preprocessing.of(model.cfg),
        new_classifier=_classes_of(model.cfg) != default,
        from_scratch=weights is None and not pretrained,
        weights=text,
    )


def _classes_of(cfg: Any) -> int | None:
    """The number of classes in a config of tfimm; None without a classifier."""
    return getattr(cfg, "nb_classes", None)


def _pretrained(tfimm: Any, name: str, requested: dict[str, Any]) -> Any:
    if name in WITHOUT_WEIGHTS and not tfimm.utils.cached_model_path(name):
        raise no_pretrained_weights(name, WITHOUT_WEIGHTS[name])
    with downloading(name, _CACHE):
        model = create_pretrained(tfimm, name, **requested)
    if hub_id(name) is None or tfimm.utils.cached_model_path(name):
        record_base_name(model, name)
    return model


def _local(name: str, weights: Any) -> Checkpoint:
    if not is_checkpoint(os.fspath(weights)):
        raise ValueError(
            f"Received weights={os.fspath(weights)!r} for {name!r}; expected a timm "
            "checkpoint: a .safetensors or torch file, or a folder of it. Pass a saved Keras "
            "model as the model itself."
        )
    return find_checkpoint(weights, None, None)


def _from_checkpoint(
    tfimm: Any, name: str, checkpoint: Checkpoint, requested: dict[str, Any]
) -> tuple[Any, int | None]:
    """Create a tfimm model with the weights of a checkpoint.

    Returns:
        The model, and the number of classes of the checkpoint.
    """
    own = _own_settings(checkpoint)
    model = create_from_file(tfimm, name, checkpoint.source, **own)
    classes = _classes_of(model.cfg)
    if all(getattr(model.cfg, key) == value for key, value in requested.items()):
        return model, classes
    names = ("mean", "std", "crop_pct", "interpolation")
    kept = {n: getattr(model.cfg, n) for n in names if hasattr(model.cfg, n)}
    changed = tfimm.create_model(name, **{**own, **kept, **requested})
    transfer_weights(model, changed)
    return changed, classes


def _own_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The number of classes and the input size in the config.json of a checkpoint."""
    config = checkpoint.config
    settings: dict[str, Any] = {}
    if isinstance(config.get("num_classes"), int):
        settings["nb_classes"] = config["num_classes"]
    fields = config.get("pretrained_cfg")
    size = fields.get("input_size") if isinstance(fields, dict) else None
    if isinstance(size, list) and len(size) == 3:
        settings["input_size"] = tuple(size[1:])
    return settings
