"""``create_model``: a LoRA model by the name that tfimm gives the model."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.load import load_adapter
from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.backend import legacy_backend
from tfimm_lora.model.classifier import classifier_names
from tfimm_lora.model.convert import (
    convert_to_lora_model,
    create_registered,
    has_new_classifier,
    lora_config_of,
)
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.registry import lora_architecture, lora_version_of
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.tfimm_models import import_tfimm, require_known
from tfimm_lora.zoo.weights.checkpoint import is_checkpoint
from tfimm_lora.zoo.weights.pretrained import create_from_file, create_pretrained


def create_model(
    model_name: str,
    pretrained: bool = False,
    model_path: str = "",
    *,
    adapter: Adapter | str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Create a LoRA model by its tfimm name.

    Args:
        model_name: A name from ``list_models()``, for example "convnext_tiny".
        pretrained: Whether to load the weights that the name stands for: from tfimm's own
            cache, else from the hub by ``load_timm_weights``, without torch (see
            docs/how-to/pretrained-weights.md). Mean, std, crop and interpolation of the
            config are then the checkpoint's.
        model_path: A saved model (SavedModel or .keras) to take the weights from; it takes
            precedence over ``pretrained``. If that is a LoRA model, its factors are taken
            over too and its config is the starting point. Or a checkpoint of timm in a
            safetensors file, or a folder with one, for the model with these arguments.
        adapter: An adapter for the model: an ``Adapter``, a folder, or "hf://user/repo". The
            model gets the LoRA that the adapter asks for, and as many classes as the
            adapter's classifier, if it holds one. lora_* arguments are then not taken.
        **kwargs: lora_* arguments go into the LoRA config (see ``LoRAConfig``), all others
            to ``tfimm.create_model`` (nb_classes, in_channels, input_size, ...).
            ``lora_train_classifier=None`` (default) trains the classifier where it is new:
            where ``nb_classes`` differs from that of the name.

    Returns:
        A built model of the registered LoRA class, for example ``LoRAConvNeXt``.

    Raises:
        ImportError: if tfimm, or what reads the weights, is not installed.
        RuntimeError: if this process runs Keras 3, which tfimm cannot use.
        ValueError: for an unknown model name (the nearest are named), an argument out of
            range, or ``pretrained`` for a name without weights (the reason is given).
        FileNotFoundError, PermissionError, ConnectionError: as ``load_timm_weights``.
        TypeError: for an unknown argument (the nearest is named), or lora_* arguments next
            to an adapter.

    Example:
        >>> import tfimm_lora as lora
        >>> model = lora.create_model("convnext_tiny", lora_rank=2)
        >>> type(model).__name__
        'LoRAConvNeXt'
    """
    tfimm = import_tfimm()
    require_known(tfimm, model_name)
    lora_cls = lora_architecture(tfimm.models.model_class(model_name))
    lora_kwargs = {k: v for k, v in kwargs.items() if k.startswith("lora_")}
    other_kwargs = {k: v for k, v in kwargs.items() if k not in lora_kwargs}
    named_cfg = tfimm.models.model_config(model_name)
    # tfimm ignores an unknown field with a line in the log; a typo must not pass. This
    # also checks the values of the LoRA config before any weight is created.
    _check_arguments(named_cfg, lora_cls, kwargs)
    if adapter is not None:
        if lora_kwargs:
            raise TypeError(
                f"Received {', '.join(lora_kwargs)} and an adapter; expected one of them: the "
                "adapter says which LoRA the model gets."
            )
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
                    "expected an ordinary one. Load it, and then load_adapter."
                )
            return _adapt_loaded(loaded, type(loaded), kwargs)
        base = tfimm.create_model(model_name, False, model_path, **other_kwargs)
    elif pretrained:
        base = create_pretrained(tfimm, model_name, **other_kwargs)
    else:
        base = tfimm.create_model(model_name, **other_kwargs)
    if adapter is not None:
        arguments = lora_arguments(base, adapter)
        if has_new_classifier(base.cfg, named_cfg):  # also where the adapter holds none
            arguments["lora_train_classifier"] = True
        return load_adapter(convert_to_lora_model(base, **arguments), adapter)
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
    tfimm = import_tfimm()
    names = tfimm.list_models()
    if pattern:
        names = fnmatch.filter(names, pattern)
    return [n for n in names if lora_version_of(tfimm.models.model_class(n)) is not None]


def _classes_of(adapter: Adapter, named_cfg: Any) -> int | None:
    """The number of classes of an adapter's classifier; None where it holds none."""
    names = [name.replace("/", ".") for name in classifier_names(named_cfg)]
    for key, value in adapter.weights.items():
        # timm calls some "head.fc" that tfimm calls "head".
        if any(key in (f"{name}.weight", f"{name}.fc.weight") for name in names):
            return int(value.shape[0])
    return None


def _check_arguments(named_cfg: Any, lora_cls: type, kwargs: dict[str, Any]) -> None:
    """Raise for an unknown or wrong argument, before any weight is created."""
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    lora_config_of(named_cfg, lora_cls, arguments)


def _load(model_path: str) -> Any:
    backend = legacy_backend()
    return backend.keras.models.load_model(model_path, compile=False)


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
