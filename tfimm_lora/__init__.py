"""LoRA for image models in TensorFlow/Keras: every Keras model, and all of tfimm.

Used as ``import tfimm_lora as lora``. Importing the package loads neither TensorFlow nor
Keras: each public name is imported from its module when it is first used. ``__init__.pyi``
lists the names.
"""

import importlib as _importlib
import warnings as _warnings
from typing import Any as _Any

import lazy_loader as _lazy_loader

from tfimm_lora import backend as _backend
from tfimm_lora.backend.import_hook import after_import as _after_import
from tfimm_lora.zoo import lora_classes as _lora_classes

_backend.prefer_legacy_for_tfimm()
if not _backend.uses_legacy_keras():
    _backend.prefer_installed_framework()

_load, _, _names = _lazy_loader.attach_stub(__name__, __file__)
_has_zoo = _backend.uses_legacy_keras() and all(
    map(_backend.installed, ("tfimm", "tensorflow"))
)

__all__ = [name for name in _names if _has_zoo or name not in _lora_classes.__all__]


def __getattr__(name: str) -> _Any:
    if name in _lora_classes.__all__ and not _has_zoo:
        raise AttributeError(
            f"tfimm_lora.{name} needs tfimm and legacy Keras. Install tfimm and set the "
            "environment variable TF_USE_LEGACY_KERAS=1 before TensorFlow is imported."
        )
    return _load(name)


def __dir__() -> list[str]:
    return list(__all__)


def _register_classes() -> None:
    """Register all LoRA classes, so that Keras can load files that hold them."""
    _importlib.import_module("tfimm_lora.layers.conversion").register_keras_layers()
    if not _has_zoo:
        return
    try:
        _lora_classes.register_all()
    except ImportError as error:  # tfimm is installed, but something that it needs is not
        _warnings.warn(
            f"tfimm is installed but cannot be imported ({error}). Its architectures are not "
            "available.",
            stacklevel=2,
        )


_after_import(
    "tf_keras" if _backend.uses_legacy_keras() else "keras",
    _register_classes,
    around=("tensorflow", "tfimm"),
)
