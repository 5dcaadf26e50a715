"""The backend between legacy Keras (``tf_keras``) and Keras 3.

Nothing outside this package asks for a Keras version or touches a private attribute of
Keras. Both sides offer the same methods (``Backend``), and the side is chosen per
object: a layer, a model or a layer class knows which Keras it comes from. So one process
may hold models of both.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from typing import Any

LEGACY_SWITCH = "TF_USE_LEGACY_KERAS"


def prefer_legacy_for_tfimm(environ: Any = os.environ) -> None:
    """Choose legacy Keras where only that can work and nobody has chosen yet.

    tfimm names layers ``blocks/0``, which Keras 3 refuses. TensorFlow reads the switch
    once, when it is imported, so this runs before that or not at all.
    """
    undecided = LEGACY_SWITCH not in environ and "tensorflow" not in sys.modules
    other_backend = environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow"
    if undecided and not other_backend and installed("tfimm") and installed("tf_keras"):
        environ[LEGACY_SWITCH] = "1"


def quiet_on_the_command_line(environ: Any = os.environ) -> None:
    """Keep TensorFlow's greeting off the screen where the process is ``tfimm-lora``.

    A library leaves the log as its user set it; a program speaks for itself. What TensorFlow
    says while it is imported no setting silences, so it goes to a file meanwhile.
    """
    words = sys.orig_argv[:4]
    is_program = any(os.path.basename(word) == "tfimm-lora" for word in words)
    if not is_program and words[1:3] != ["-m", "tfimm_lora"]:
        return
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in environ:
        return
    environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    screen = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        except BaseException:
            said.seek(0)
            os.write(screen, said.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def uses_legacy_keras() -> bool:
    """Whether ``tf.keras`` means legacy Keras in this process."""
    return os.environ.get(LEGACY_SWITCH, "").lower() in ("1", "true")


def legacy_backend() -> Any:
    """The backend of legacy Keras."""
    # First, because importing it may lead here again; see ``import_hook``.
    importlib.import_module("tf_keras")
    return importlib.import_module("tfimm_lora.backend.legacy").BACKEND


def keras3_backend() -> Any:
    """The backend of Keras 3."""
    importlib.import_module("keras")
    return importlib.import_module("tfimm_lora.backend.keras3").BACKEND


def default_backend() -> Any:
    """The backend to the Keras that this process uses unless told otherwise."""
    return legacy_backend() if uses_legacy_keras() else keras3_backend()


def backend_of(obj: Any) -> Any:
    """The backend to the Keras of a layer, a model, or a class of either.

    Raises:
        TypeError: if ``obj`` belongs to neither Keras.
    """
    cls = obj if isinstance(obj, type) else type(obj)
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "tf_keras":
            return legacy_backend()
        if root == "keras":
            return keras3_backend()
    raise TypeError(
        f"Received {obj!r} of type {cls.__module__}.{cls.__qualname__}; expected a Keras "
        "layer or model (of tf_keras or of Keras 3)."
    )
