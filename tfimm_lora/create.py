"""``create_model``: create a LoRA model by its name in tfimm or timm."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.adapters.model_names import weights_by_timm_key
from tfimm_lora.backend import keras3_backend, legacy_backend, uses_legacy_keras
from tfimm_lora.config import LoRAConfig, lora_field_names
from tfimm_lora.model.classifier import classifier_names, classifier_paths
from tfimm_lora.model.convert import (
    convert_to_lora_model,
    create_registered,
    has_new_classifier,
    lora_config_of,
)
from tfimm_lora.model.inject import inject_lora
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.registry import lora_architecture, lora_version_of
from tfimm_lora.model.state import random_weights, record_base_name
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.validation import check_keywords
from tfimm_lora.zoo.keras3_models.base import ARGUMENTS, create_base
from tfimm_lora.zoo.keras3_models.known import names as keras3_names
from tfimm_lora.zoo.tfimm_models import import_tfimm, require_known
from tfimm_lora.zoo.weights.checkpoint import is_checkpoint
from tfimm_lora.zoo.weights.pretrained import create_from_file, create_pretrained

#: The names of classifiers in timm, transformers, keras_hub and ``keras.applications``.
_HEADS = ("head", "fc", "classifier", "classifier.1", "predictions", "logits")


def create_model(
    model_name: str,
    pretrained: bool = False,
    model_path: str = "",
    *,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Create a LoRA model by its name in tfimm or timm.

    On legacy Keras the model is tfimm's. On Keras 3 it is built by keras_hub or
    ``keras.applications`` with the exact architecture of timm, without tfimm and timm.

    Args:
        model_name: A name from ``list_models()``, for example "convnext_tiny". On Keras 3 also
            a name with a tag of timm ("vit_base_patch16_224.augreg_in1k"), a preset of
            keras_hub ("hub/dinov2_base"), or a folder or repository ("hf://user/name") of
            keras_hub, timm or transformers (docs/how-to/models-on-keras-3.md). Models without
            a classifier get one for ``nb_classes``.
        pretrained: Whether to load the pretrained weights of this name: from tfimm's own
            cache, otherwise from the hub with ``load_timm_weights``, without torch (see
            docs/how-to/pretrained-weights.md). Mean, std, crop and interpolation of the
            config are then those of the checkpoint.
        model_path: A saved model (SavedModel or .keras) from which to copy the weights; it
            takes precedence over ``pretrained``. From a LoRA model the factors are copied
            too, and its config supplies the defaults of the arguments. Alternatively a timm
            checkpoint in a safetensors file, or a folder with one, for the model with these
            arguments.
        adapter: An adapter for the model: an ``Adapter``, a folder, or "hf://user/repo". The
            model gets the LoRA settings of the adapter, and as many classes as the adapter's
            classifier, if it contains one. lora_* arguments are not allowed then.
        **kwargs: lora_* arguments are passed to the LoRA config (see ``LoRAConfig``), all
            others to ``tfimm.create_model`` (nb_classes, in_channels, input_size, ...). On
            Keras 3 these are nb_classes, in_channels, input_size, mean, std, crop_pct and
            interpolation.
            ``lora_train_classifier=None`` (default) trains the classifier if it is new: if
            ``nb_classes`` differs from the number of classes of the named model.

    Returns:
        A built model of the registered LoRA class, for example ``LoRAConvNeXt``. On Keras 3 a
        functional model with LoRA, whose ``cfg`` has its name and preprocessing.

    Raises:
        ImportError: If tfimm, keras_hub or a package that reads the weights is not installed.
        ValueError: If the model name is unknown (the message suggests similar ones), if Keras
            3 cannot build the model exactly, if an argument is out of range, or if
            ``pretrained`` is given for a name without weights (the message explains why).
        FileNotFoundError, PermissionError, ConnectionError: As ``load_timm_weights``.
        TypeError: If an argument is unknown (the message suggests the most similar one), or
            if lora_* arguments are given with an adapter.

    Example:
        >>> import tfimm_lora as lora
        >>> model = lora.create_model("convnext_tiny", lora_rank=2)
        >>> type(model).__name__
        'LoRAConvNeXt'
    """
    if not uses_legacy_keras():
        return _create_on_keras3(model_name, pretrained, model_path, adapter, kwargs)
    tfimm = import_tfimm()
    require_known(tfimm, model_name)
    lora_cls = lora_architecture(tfimm.models.model_class(model_name))
    lora_kwargs = {k: v for k, v in kwargs.items() if k.startswith("lora_")}
    other_kwargs = {k: v for k, v in kwargs.items() if k not in lora_kwargs}
    named_cfg = tfimm.models.model_config(model_name)
    # tfimm only logs unknown fields, so a typo would go unnoticed. This also checks the
    # values of the LoRA config before any weight is created.
    _check_arguments(named_cfg, lora_cls, kwargs)
    if adapter is not None:
        _require_no_settings(lora_kwargs)
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter)
        if other_kwargs.get("nb_classes") is None:
            other_kwargs["nb_classes"] = _classes_of(adapter, named_cfg)
    if model_path and is_checkpoint(model_path):
        base = create_from_file(tfimm, model_name, model_path, **other_kwargs)
    elif model_path:
        loaded = _load(model_path)
        if has_lora(loaded):
            if adapter is not None:
                raise ValueError(
                    f"Received an adapter and model_path={model_path!r}, a LoRA model; "
                    "expected an ordinary model. Load the LoRA model, then call load_adapter."
                )
            return _adapt_loaded(loaded, type(loaded), kwargs)
        base = tfimm.create_model(model_name, False, model_path, **other_kwargs)
        record_base_name(base, os.path.basename(os.path.abspath(model_path)))
    elif pretrained:
        base = create_pretrained(tfimm, model_name, **other_kwargs)
    else:
        base = tfimm.create_model(model_name, **other_kwargs)
        record_base_name(base, random_weights(model_name))
    if adapter is not None:
        arguments = lora_arguments(base, adapter)
        if has_new_classifier(base.cfg, named_cfg):  # even if the adapter has no classifier
            arguments["lora_train_classifier"] = True
        return load_adapter(convert_to_lora_model(base, **arguments), adapter)
    if lora_kwargs.get("lora_train_classifier") is None:
        lora_kwargs["lora_train_classifier"] = has_new_classifier(base.cfg, named_cfg)
    return convert_to_lora_model(base, **lora_kwargs)


def _create_on_keras3(
    name: str,
    pretrained: bool,
    model_path: str,
    adapter: Adapter | str | os.PathLike[str] | None,
    kwargs: dict[str, Any],
) -> Any:
    """Implement ``create_model`` on Keras 3."""
    lora_kwargs = {k: v for k, v in kwargs.items() if k.startswith("lora_")}
    arguments = {k: v for k, v in kwargs.items() if k not in lora_kwargs}
    # Before any weight is created.
    check_keywords(kwargs, (*lora_field_names(), *ARGUMENTS), "create_model")
    LoRAConfig(**{k: v for k, v in lora_kwargs.items() if v is not None})
    if adapter is not None:
        _require_no_settings(lora_kwargs)
        if not isinstance(adapter, Adapter):
            adapter = Adapter.load(adapter)
        if arguments.get("nb_classes") is None:
            arguments["nb_classes"] = _classes_in(adapter, _HEADS)
    checkpoint = model_path if model_path and is_checkpoint(model_path) else None
    base = create_base(
        name, pretrained=pretrained and not model_path, weights=checkpoint, **arguments
    )
    if model_path and checkpoint is None:
        _copy_saved_weights(model_path, base.model)
    if adapter is not None:
        settings = lora_arguments(base.model, adapter)
        if base.new_classifier:  # even if the adapter has no classifier
            settings["lora_train_classifier"] = True
        return load_adapter(inject_lora(base.model, **settings), adapter)
    if lora_kwargs.get("lora_train_classifier") is None:
        lora_kwargs["lora_train_classifier"] = base.new_classifier
    return inject_lora(base.model, **lora_kwargs)


def _copy_saved_weights(model_path: str, model: Any) -> None:
    """Copy the weights of a saved Keras model."""
    saved = keras3_backend().keras.models.load_model(model_path, compile=False)
    if has_lora(saved):
        raise ValueError(
            f"Received model_path={model_path!r}, a LoRA model; expected an ordinary model. "
            "Load it with keras.models.load_model, or save its adapter and pass it as adapter."
        )
    head = classifier_paths(model)
    sizes = [x.output_shape[-1] for x in (saved, model)]
    ignored = [f"^{re.escape(path)}/" for path in head] if sizes[0] != sizes[1] else None
    transfer_weights(saved, model, ignored)
    record_base_name(model, os.path.basename(os.path.abspath(model_path)))


def _require_no_settings(lora_kwargs: dict[str, Any]) -> None:
    if lora_kwargs:
        raise TypeError(
            f"Received {', '.join(lora_kwargs)} and an adapter; expected only one of them: "
            "the adapter determines the LoRA settings of the model."
        )


def list_models(pattern: str = "") -> list[str]:
    """List the names of models that ``create_model`` can create, in natural order.

    On legacy Keras these are the models of tfimm that have a LoRA version. On Keras 3 they are
    the models of tfimm and timm that keras_hub and ``keras.applications`` build exactly.

    Args:
        pattern: Shell-style wildcards, for example "convnext_*". "" (default) means all names.

    Returns:
        The names; empty if none matches.

    Raises:
        ImportError: On legacy Keras, if tfimm is not installed.

    Example:
        >>> import tfimm_lora as lora
        >>> "convnext_tiny" in lora.list_models("convnext_t*")
        True
    """
    if not uses_legacy_keras():
        return fnmatch.filter(keras3_names(), pattern or "*")
    tfimm = import_tfimm()
    names = tfimm.list_models()
    if pattern:
        names = fnmatch.filter(names, pattern)
    return [n for n in names if lora_version_of(tfimm.models.model_class(n)) is not None]


def _classes_of(adapter: Adapter, named_cfg: Any) -> int | None:
    """Return the number of classes of an adapter's classifier; None if it has none."""
    return _classes_in(adapter, [x.replace("/", ".") for x in classifier_names(named_cfg)])


def _classes_in(adapter: Adapter, names: Iterable[str]) -> int | None:
    for key, value in weights_by_timm_key(adapter).items():
        # Some are named "head.fc" in timm and "head" in tfimm.
        if any(key in (f"{name}.weight", f"{name}.fc.weight") for name in names):
            return int(value.shape[0])
    return None


def _check_arguments(named_cfg: Any, lora_cls: type, kwargs: dict[str, Any]) -> None:
    """Raise if an argument is unknown or invalid, before any weight is created."""
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    lora_config_of(named_cfg, lora_cls, arguments)


def _load(model_path: str) -> Any:
    backend = legacy_backend()
    return backend.keras.models.load_model(model_path, compile=False)


def _adapt_loaded(loaded: Any, lora_cls: type, kwargs: dict[str, Any]) -> Any:
    """Return a LoRA model that was loaded from a file, with the requested config."""
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    cfg = lora_config_of(loaded.cfg, lora_cls, arguments)
    if has_new_classifier(cfg, loaded.cfg) and "lora_train_classifier" not in arguments:
        cfg.lora_train_classifier = True
    if cfg == loaded.cfg:
        return loaded
    model = create_registered(lora_cls, cfg, loaded)
    transfer_weights(loaded, model)
    return model
