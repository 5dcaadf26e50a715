"""The registry of LoRA classes and config classes by model class.

This is not the registry of model names: ``ConvNeXt`` is one class with many names
("convnext_tiny", ...), whose configs are instances of one config class.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

from tfimm_lora.config import LoRAConfig, Targets
from tfimm_lora.utils.suggestions import close_names

_lora_classes: dict[type, type] = {}
_base_classes: dict[type, type] = {}


def register_lora_architecture(lora_cls: Any = None, *, base_cls: type | None = None) -> Any:
    """Register a class as the LoRA version of a model class.

    Use it in one of three ways. As a decorator without arguments, if the LoRA class inherits
    from the model class::

        @register_lora_architecture
        class LoRAResNet(ResNet): ...

    As a decorator with the model class, if it does not::

        @register_lora_architecture(base_cls=ResNet)
        class LoRAResNet(tf.keras.Model): ...

    As a function, for a class that is its own LoRA version, depending on its config::

        register_lora_architecture(FlexibleModel, base_cls=FlexibleModel)

    Args:
        lora_cls: The LoRA class. Its attribute ``cfg_class`` is a dataclass with the
            fields of the model's config class and the lora_* fields, all with defaults.
        base_cls: The model class. None (default) means the nearest base of ``lora_cls``
            that has a ``cfg_class``.

    Returns:
        ``lora_cls``, or a decorator if it is not given.

    Raises:
        TypeError: If a class or its ``cfg_class`` is missing or not a dataclass, or if the
            LoRA config lacks fields of the model's config.

    Warns:
        UserWarning: If the model class already has another LoRA version, which is replaced.
    """
    if lora_cls is None:
        return functools.partial(register_lora_architecture, base_cls=base_cls)
    if not isinstance(lora_cls, type):
        raise TypeError(
            f"Received {lora_cls!r}; expected a class. With arguments, write "
            "@register_lora_architecture(base_cls=...)."
        )
    base = base_cls or _base_with_config(lora_cls)
    _check_configs(lora_cls, base)
    known = _lora_classes.get(base)
    if known is not None and known is not lora_cls:
        warnings.warn(
            f"{_name(base)} already has the LoRA version {_name(known)}, which is replaced by "
            f"{_name(lora_cls)}.",
            stacklevel=2,
        )
        _base_classes.pop(known, None)
    _lora_classes[base] = lora_cls
    _base_classes[lora_cls] = base
    return lora_cls


def lora_architecture(model_cls: type) -> type:
    """Return the LoRA class registered for a model class.

    Raises:
        ValueError: If there is none. The message lists the registered classes.
    """
    return _look_up(_lora_classes, model_cls, "a LoRA version of")


def lora_base_architecture(lora_cls: type) -> type:
    """Return the model class for which a LoRA class is registered.

    Raises:
        ValueError: If it is not registered. The message lists the registered classes.
    """
    return _look_up(_base_classes, lora_cls, "a model class for")


def lora_config(model_cls: type) -> type:
    """Return the config class of the LoRA version of a model class.

    Raises:
        ValueError: If the class has no LoRA version. The message lists the registered classes.
    """
    result: type = lora_architecture(model_cls).cfg_class  # type: ignore[attr-defined]
    return result


def lora_base_of(model_cls: type) -> type | None:
    """Return the result of ``lora_base_architecture``, or None if it would raise."""
    return _base_classes.get(model_cls)


def lora_version_of(model_cls: type) -> type | None:
    """Return the result of ``lora_architecture``, or None if it would raise."""
    return _lora_classes.get(model_cls)


def default_targets(model_cls: type) -> Targets:
    """Return the default targets of the LoRA config of a model class, or None."""
    model_cls = _plain_class(model_cls)
    if model_cls not in _lora_classes:
        return None
    for field in dataclasses.fields(lora_config(model_cls)):
        if field.name == "lora_targets":
            return None if field.default is dataclasses.MISSING else field.default
    return None


def presets(model_cls: type) -> dict[str, Targets]:
    """Return the target presets of a model class; see ``LoRAConfig.presets``."""
    model_cls = _plain_class(model_cls)
    lora_cls = model_cls if model_cls in _base_classes else _lora_classes.get(model_cls)
    cfg_cls = getattr(lora_cls, "cfg_class", None)
    if isinstance(cfg_cls, type) and issubclass(cfg_cls, LoRAConfig):
        return cfg_cls.presets()
    return LoRAConfig.presets()


def _plain_class(model_cls: type) -> type:
    """The architecture of a class that adds a decoder to it; see ``segmentation_classes``."""
    plain: type = getattr(model_cls, "plain_class", model_cls)
    return plain


def base_config(cfg: Any, base_cls: type) -> Any:
    """Return the config of the model class with the values of a LoRA config.

    The lora_* fields, which a class that is its own LoRA version has, get their defaults.
    """
    fields = dataclasses.fields(base_cls.cfg_class)  # type: ignore[attr-defined]
    names = [f.name for f in fields if f.init and not f.name.startswith("lora_")]
    values = {name: getattr(cfg, name) for name in names}
    return base_cls.cfg_class(**values)  # type: ignore[attr-defined]


def _look_up(table: dict[type, type], cls: type, what: str) -> type:
    if cls not in table:
        wanted = _name(cls)
        known = sorted(_name(each) for each in table)
        names = close_names(wanted, known, limit=len(known) or 1, similarity=0.0)
        raise ValueError(
            f"Received {wanted}; {what} it is not registered. Registered: "
            f"{', '.join(names) or 'none'}. Register your class with "
            "@register_lora_architecture, or use inject_lora, which needs no registration."
        )
    return table[cls]


def _name(cls: Any) -> str:
    return getattr(cls, "__qualname__", repr(cls))


def _base_with_config(lora_cls: type) -> type:
    for base in lora_cls.__mro__[1:]:
        if hasattr(base, "cfg_class"):
            return base
    raise TypeError(
        f"Received {_name(lora_cls)}, whose model class is unknown; expected a base class with "
        "a cfg_class. Write @register_lora_architecture(base_cls=...)."
    )


def _check_configs(lora_cls: type, base_cls: type) -> None:
    for cls in (lora_cls, base_cls):
        if not dataclasses.is_dataclass(getattr(cls, "cfg_class", None)):
            raise TypeError(
                f"Received {_name(cls)} with cfg_class="
                f"{getattr(cls, 'cfg_class', None)!r}; expected a dataclass."
            )
    given, needed = (
        {field.name for field in dataclasses.fields(cls.cfg_class)}  # type: ignore[attr-defined]
        for cls in (lora_cls, base_cls)
    )
    missing = needed - given
    if missing:
        raise TypeError(
            f"The config class of {_name(lora_cls)} lacks the fields {sorted(missing)} of the "
            f"config class of {_name(base_cls)}; inherit from that class."
        )
