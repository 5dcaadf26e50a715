"""The differences between legacy Keras (``tf_keras``) and Keras 3.

Nothing outside this package asks for a Keras version or touches a private attribute of
Keras. Both implement the same interface (``Backend``). ``backend_of`` returns that of a
layer, a model or a layer class, so one process may hold models of both.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any

from tfimm_lora.backend.frameworks import (
    FRAMEWORK_SWITCH,
    LEGACY_SWITCH,
    automatic_selection,
    how_to_use_tensorflow,
    installed,
    prefer_installed_framework,
    require_framework,
    require_legacy_keras,
)
from tfimm_lora.backend.interface import Backend

__all__ = [
    "automatic_selection",
    "backend_of",
    "default_backend",
    "how_to_use_tensorflow",
    "installed",
    "keras3_backend",
    "legacy_backend",
    "prefer_installed_framework",
    "prefer_legacy_for_tfimm",
    "uses_legacy_keras",
]

#: What legacy Keras with tfimm consists of.
_FOR_TFIMM = ("tfimm", "tf_keras", "tensorflow")


def prefer_legacy_for_tfimm(environ: Any = os.environ) -> None:
    """Select legacy Keras if tfimm is installed and nothing else was selected.

    tfimm names layers ``blocks/0``, which Keras 3 does not allow. TensorFlow reads the
    environment variable when it is imported, so afterwards this has no effect.
    """
    undecided = LEGACY_SWITCH not in environ and "tensorflow" not in sys.modules
    other_backend = environ.get(FRAMEWORK_SWITCH, "tensorflow") != "tensorflow"
    if undecided and not other_backend and all(map(installed, _FOR_TFIMM)):
        environ[LEGACY_SWITCH] = "1"


def uses_legacy_keras() -> bool:
    """Whether ``tf.keras`` means legacy Keras in this process."""
    return os.environ.get(LEGACY_SWITCH, "").lower() in ("1", "true")


def legacy_backend() -> Backend:
    """The backend of legacy Keras.

    Raises:
        ImportError: if legacy Keras or TensorFlow is not installed.
    """
    if "tf_keras" not in sys.modules:
        require_legacy_keras()
    # First, because importing it may lead here again; see ``import_hook``. A statement, because
    # layers call this function while AutoGraph converts them, which cannot convert importlib.
    import tf_keras  # noqa: F401

    from tfimm_lora.backend.legacy import BACKEND

    return BACKEND


def keras3_backend() -> Backend:
    """The backend of Keras 3.

    Raises:
        ImportError: if the framework that it runs on is not installed.
    """
    if "keras" not in sys.modules:
        require_framework()
    import keras  # noqa: F401

    from tfimm_lora.backend.keras3 import BACKEND

    return BACKEND


def default_backend() -> Backend:
    """The backend of the Keras that this process uses unless told otherwise."""
    return legacy_backend() if uses_legacy_keras() else keras3_backend()


#: Class -> its backend. Weak, so that classes defined in a notebook can be collected.
_backends: weakref.WeakKeyDictionary[type, Backend] = weakref.WeakKeyDictionary()


def backend_of(obj: Any) -> Backend:
    """The backend of a layer, a model, or a class of either.

    Raises:
        TypeError: if ``obj`` belongs to neither Keras.
    """
    cls = obj if isinstance(obj, type) else type(obj)
    found = _backends.get(cls)
    if found is None:
        found = _backends[cls] = _look_up(cls, obj)
    return found


def _look_up(cls: type, obj: Any) -> Backend:
    for base in cls.__mro__:
        package = base.__module__.partition(".")[0]
        if package == "tf_keras":
            return legacy_backend()
        if package == "keras":
            return keras3_backend()
    raise TypeError(
        f"Received {obj!r} of type {cls.__module__}.{cls.__qualname__}; expected a Keras "
        "layer or model (of tf_keras or of Keras 3)."
    )
