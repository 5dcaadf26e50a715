"""The differences between legacy Keras (``tf_keras``) and Keras 3.

Nothing outside this package asks for a Keras version or touches a private attribute of
Keras. Both implement the same interface (``Backend``). ``backend_of`` returns that of a
layer, a model or a layer class, so one process may hold models of both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import weakref
from typing import Any

from tfimm_lora.backend.interface import Backend

LEGACY_SWITCH = "TF_USE_LEGACY_KERAS"


def prefer_legacy_for_tfimm(environ: Any = os.environ) -> None:
    """Select legacy Keras if tfimm is installed and nothing else was selected.

    tfimm names layers ``blocks/0``, which Keras 3 does not allow. TensorFlow reads the
    environment variable when it is imported, so afterwards this has no effect.
    """
    undecided = LEGACY_SWITCH not in environ and "tensorflow" not in sys.modules
    other_backend = environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow"
    if undecided and not other_backend and installed("tfimm") and installed("tf_keras"):
        environ[LEGACY_SWITCH] = "1"


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def uses_legacy_keras() -> bool:
    """Whether ``tf.keras`` means legacy Keras in this process."""
    return os.environ.get(LEGACY_SWITCH, "").lower() in ("1", "true")


def legacy_backend() -> Backend:
    """The backend of legacy Keras."""
    # First, because importing it may lead here again; see ``import_hook``.
    importlib.import_module("tf_keras")
    from tfimm_lora.backend.legacy import BACKEND

    return BACKEND


def keras3_backend() -> Backend:
    """The backend of Keras 3."""
    importlib.import_module("keras")
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
