"""``convert_to_lora_model`` and ``convert_to_regular_model``: create converted copies."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
from tfimm_lora.config import LORA_VARIABLE_NAMES, lora_field_names
from tfimm_lora.layers.base import building_for_other_weights
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.copy import build_like, plain_copy
from tfimm_lora.model.inject import freeze_rest, inject_lora
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.model.registry import base_config, lora_base_of, lora_version_of
from tfimm_lora.model.state import config_of, copy_base_name, copy_description
from tfimm_lora.model.trainable_weights import inside_paths
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.validation import check_keywords


def convert_to_lora_model(model: Any, **arguments: Any) -> Any:
    """Create a LoRA model with the weights of a model. The argument is not changed.

    Args:
        model: A built model without LoRA. If its class is registered (every tfimm
            architecture that ``lora.lora_architecture`` accepts, or a class of your own),
            the result is an instance of its LoRA class. For any other Keras model it is a
            copy into which ``inject_lora`` injected LoRA.
        **arguments: Fields of ``LoRAConfig`` (lora_rank, ...). For a registered class also
            fields of its config to change, for example ``nb_classes=13``: the classifier is
            then new and trained, unless ``lora_train_classifier`` is given.

    Returns:
        The new model. Before training its outputs are those of the original model.

    Raises:
        TypeError: If an argument is unknown. The message suggests the most similar one.
        ValueError: If an argument is out of range, if the model is not built, has LoRA
            already or cannot be copied, or if the targets match nothing.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc1"),
        ...     tf.keras.layers.Dense(3, name="fc")])
        >>> lora_model = lora.convert_to_lora_model(model, lora_rank=2)
        >>> len(model.trainable_weights), len(lora_model.trainable_weights)
        (4, 2)
    """
    if has_lora(model):
        raise ValueError(
            f"Received model '{model.name}', which has LoRA already; expected a model without "
            "LoRA. Convert the result of convert_to_regular_model(model), which contains the "
            "merged updates."
        )
    lora_cls = lora_version_of(type(model))
    if lora_cls is None or not hasattr(model, "cfg"):
        check_keywords(arguments, lora_field_names(), "convert_to_lora_model")
        copied = plain_copy(model)
        copy_base_name(model, copied)
        return inject_lora(copied, **arguments)
    cfg = lora_config_of(model.cfg, lora_cls, arguments)
    with backend_of(model).created_like(model), building_for_other_weights():
        lora_model = create_registered(lora_cls, cfg, model)
    transfer_weights(model, lora_model, weights_to_ignore=LORA_VARIABLE_NAMES)
    copy_base_name(model, lora_model)
    for layer in lora_layers(lora_model).values():
        layer.initialize_factors()
    return lora_model


def lora_config_of(cfg: Any, lora_cls: type, arguments: dict[str, Any]) -> Any:
    """Return the LoRA config of a model with the config ``cfg``, with ``arguments`` set."""
    cfg_cls = lora_cls.cfg_class  # type: ignore[attr-defined]
    known = [f.name for f in dataclasses.fields(cfg_cls) if f.init]
    check_keywords(arguments, known, lora_cls.__name__)
    values = {
        f.name: copy.deepcopy(getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if f.init
    }
    if arguments.get("lora_targets", ()) is None:
        arguments = {k: v for k, v in arguments.items() if k != "lora_targets"}
    lora_cfg = cfg_cls(**{**values, **arguments})
    if getattr(lora_cfg, "lora_train_classifier", True) is None:
        # Resolved now, because a saved config does not record which classifier was new.
        lora_cfg.lora_train_classifier = has_new_classifier(lora_cfg, cfg)
    return lora_cfg


def has_new_classifier(cfg: Any, before: Any) -> bool:
    """Whether a model of ``cfg`` has another number of classes than one of ``before``."""
    classes = getattr(cfg, "nb_classes", None)
    return bool(classes) and classes != getattr(before, "nb_classes", None)


def create_registered(lora_cls: type, cfg: Any, like: Layer) -> Any:
    """Create a built and frozen instance of a registered LoRA class, for the inputs of
    ``like``."""
    model = lora_cls(cfg)
    backend = backend_of(model)
    build_like(backend, model, like)
    if not has_lora(model):
        raise ValueError(
            f"{lora_cls.__name__} has no LoRA layers after it was created with {cfg}; expected "
            "at least one. Convert layers with convert_to_lora_layer in its __init__."
        )
    if not _defines_trainable_weights(lora_cls) and config_of(model) is None:
        train_classifier = getattr(cfg, "lora_train_classifier", False)
        names = classifier_paths(model) if train_classifier else []
        train_bias = getattr(cfg, "lora_train_bias", "none")
        trained = inside_paths(backend.walk(model), names)
        freeze_rest(model, train_bias, trained, rebuilt_by_class=True)
    return model


def _defines_trainable_weights(lora_cls: type) -> bool:
    """Whether a user's class defines ``trainable_weights`` itself."""
    for cls in lora_cls.__mro__:
        if "trainable_weights" in cls.__dict__:
            return cls.__module__.partition(".")[0] not in (
                "keras",
                "tf_keras",
                "tfimm_lora",
            )
    return False


def convert_to_regular_model(model: Any) -> Any:
    """Create an ordinary model that contains the merged updates of a LoRA model.

    The argument is not changed, merged or not. The result has ordinary classes only, so it
    can be saved, loaded and used without this package.

    Args:
        model: A built model with LoRA: of a registered LoRA class, or one that LoRA was
            injected into.

    Returns:
        The new model: of the base class for a registered LoRA class, otherwise a copy.

    Raises:
        ValueError: If the model has no LoRA layers, is not built or cannot be copied.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> [type(x).__name__ for x in lora.convert_to_regular_model(model).layers]
        ['Dense']
    """
    for layer in lora_layers(model).values():
        layer._require_built("merge")
    base_cls = lora_base_of(type(model))
    if base_cls is None:
        return plain_copy(model)
    backend = backend_of(model)
    with backend.created_like(model):
        regular = base_cls(base_config(model.cfg, base_cls))
        build_like(backend, regular, model)
    with _kernels_merged(model):
        transfer_weights(model, regular)
    copy_description(model, regular)
    return regular


class _kernels_merged:
    """Merge every LoRA layer within this block, and restore all exactly afterwards."""

    def __init__(self, model: Layer) -> None:
        self._layers = [x for x in lora_layers(model).values() if not x.merged]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.merge_weights()

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            if layer.merged:
                layer.unmerge_weights()
