"""``create_model``: a LoRA model by the name that tfimm gives the model."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from tfimm_lora import _keras
from tfimm_lora.convert import (
    convert_to_lora_model,
    create_registered,
    has_new_classifier,
    lora_config_of,
)
from tfimm_lora.merge import has_lora
from tfimm_lora.registry import lora_architecture, lora_version_of
from tfimm_lora.transfer import transfer_weights


def create_model(
    model_name: str, pretrained: bool = False, model_path: str = "", **kwargs: Any
) -> Any:
    """Create a LoRA model by its tfimm name.

    Args:
        model_name: A name from ``list_models()``, for example "convnext_tiny".
        pretrained: Whether to load pretrained weights, as ``tfimm.create_model`` does.
        model_path: A saved model (SavedModel or .keras) to take the weights from; it takes
            precedence over ``pretrained``. If that is a LoRA model, its factors are taken
            over too and its config is the starting point.
        **kwargs: lora_* arguments go into the LoRA config (see ``LoRAConfig``), all others
            to ``tfimm.create_model`` (nb_classes, in_channels, input_size, ...).
            ``lora_train_classifier=None`` (default) trains the classifier where it is new:
            where ``nb_classes`` differs from that of the name.

    Returns:
        A built model of the registered LoRA class, for example ``LoRAConvNeXt``.

    Raises:
        ImportError: if tfimm is not installed.
        RuntimeError: if this process runs Keras 3, which tfimm cannot use.
        ValueError: for an unknown model name (the nearest are named) or an argument out
            of range.
        TypeError: for an unknown argument (the nearest is named).

    Example:
        >>> import tfimm_lora as lora
        >>> model = lora.create_model("convnext_tiny", lora_rank=2)
        >>> type(model).__name__
        'LoRAConvNeXt'
    """
    tfimm = _import_tfimm()
    if not tfimm.models.is_model(model_name):
        near = difflib.get_close_matches(model_name, tfimm.list_models(), n=5)
        raise ValueError(
            f"Received model_name={model_name!r}, which tfimm does not know. "
            + (f"Nearest: {', '.join(near)}. " if near else "")
            + "See list_models()."
        )
    lora_cls = lora_architecture(tfimm.models.model_class(model_name))
    lora_kwargs = {k: v for k, v in kwargs.items() if k.startswith("lora_")}
    other_kwargs = {k: v for k, v in kwargs.items() if k not in lora_kwargs}
    named_cfg = tfimm.models.model_config(model_name)
    # tfimm ignores an unknown field with a line in the log; a typo must not pass. This
    # also checks the values of the LoRA config before any weight is created.
    _check_arguments(named_cfg, lora_cls, kwargs)
    if model_path:
        loaded = _load(model_path)
        if has_lora(loaded):
            return _adapt_loaded(loaded, type(loaded), kwargs)
    base = tfimm.create_model(model_name, pretrained, model_path, **other_kwargs)
    if lora_kwargs.get("lora_train_classifier") is None:
        lora_kwargs["lora_train_classifier"] = has_new_classifier(base.cfg, named_cfg)
    return convert_to_lora_model(base, **lora_kwargs)


def list_models(pattern: str = "") -> list[str]:
    """The names of tfimm models that have a LoRA version, sorted naturally.

    Args:
        pattern: Shell-style wildcards, for example "convnext_*". Default: all names.

    Returns:
        Names, empty if none matches.

    Raises:
        ImportError, RuntimeError: as ``create_model``.

    Example:
        >>> import tfimm_lora as lora
        >>> "convnext_tiny" in lora.list_models("convnext_t*")
        True
    """
    tfimm = _import_tfimm()
    names = tfimm.list_models()
    if pattern:
        names = fnmatch.filter(names, pattern)
    return [n for n in names if lora_version_of(tfimm.models.model_class(n)) is not None]


def _import_tfimm() -> Any:
    if not _keras.installed("tfimm"):
        raise ImportError(
            "This function needs tfimm, which is not installed. Install it with: pip "
            "install --no-deps --ignore-requires-python tfimm==0.2.14 && pip install "
            "tf-keras markdown"
        )
    if not _keras.uses_legacy_keras():
        raise RuntimeError(
            "tfimm works on legacy Keras only: set the environment variable "
            "TF_USE_LEGACY_KERAS=1 before TensorFlow is imported."
        )
    import tfimm

    return tfimm


def _check_arguments(named_cfg: Any, lora_cls: type, kwargs: dict[str, Any]) -> None:
    """Raise for an unknown or wrong argument, before any weight is created."""
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    lora_config_of(named_cfg, lora_cls, arguments)


def _load(model_path: str) -> Any:
    seam = _keras.legacy_seam()
    return seam.keras.models.load_model(model_path, compile=False)


def _adapt_loaded(loaded: Any, lora_cls: type, kwargs: dict[str, Any]) -> Any:
    """A LoRA model that was loaded from a file, with the config asked for."""
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    cfg = lora_config_of(loaded.cfg, lora_cls, arguments)
    if has_new_classifier(cfg, loaded.cfg) and "lora_train_classifier" not in arguments:
        cfg.lora_train_classifier = True
    if cfg == loaded.cfg:
        return loaded
    model = create_registered(lora_cls, cfg, loaded)
    transfer_weights(loaded, model)
    return model
