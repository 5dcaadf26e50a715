"""The framework that Keras 3 runs on: TensorFlow, JAX or torch, whichever is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

LEGACY_SWITCH = "TF_USE_LEGACY_KERAS"
FRAMEWORK_SWITCH = "KERAS_BACKEND"

#: The frameworks in the order of preference, each with its name in sentences.
FRAMEWORKS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}

#: The framework that ``prefer_installed_framework`` selected in this process.
automatic: str | None = None


def installed(package: str) -> bool:
    """Whether ``package`` can be imported, without importing it."""
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    # A folder without an __init__.py, as an uninstalled package may leave, has no origin.
    return spec is not None and spec.origin is not None


def selected_framework(environ: Any = os.environ) -> str:
    """The framework that Keras 3 will import: by KERAS_BACKEND, else by the file keras.json."""
    return str(environ.get(FRAMEWORK_SWITCH) or _configured(environ))


def _configured(environ: Any) -> str:
    """The framework in keras.json, which Keras itself writes if it does not exist."""
    folder = environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")
    try:
        with open(os.path.join(folder, "keras.json"), encoding="utf-8") as file:
            return str(json.load(file).get("backend", "tensorflow"))
    except (OSError, ValueError, AttributeError):
        return "tensorflow"


def prefer_installed_framework(environ: Any = os.environ) -> None:
    """Select JAX or torch for Keras 3 if TensorFlow, Keras' default, is not installed.

    The selection of the user, with KERAS_BACKEND or in keras.json, is kept. "tensorflow" in
    keras.json is not a selection: Keras writes it there. Keras reads the environment variable
    when it is imported, so afterwards this has no effect.
    """
    global automatic
    if environ.get(FRAMEWORK_SWITCH) or "keras" in sys.modules or installed("tensorflow"):
        return
    if selected_framework(environ) != "tensorflow":
        return
    found = next((name for name in FRAMEWORKS if installed(name)), None)
    if found is not None:
        environ[FRAMEWORK_SWITCH] = automatic = found


def automatic_selection() -> str:
    """A sentence on the framework that was selected automatically, or "" if none was."""
    if automatic is None:
        return ""
    others = [name for name in FRAMEWORKS if name != automatic and installed(name)]
    return f"TensorFlow is not installed: Keras 3 runs on {FRAMEWORKS[automatic]}" + "".join(
        f" (for {FRAMEWORKS[name]}, set KERAS_BACKEND={name})" for name in others
    )


def how_to_use_tensorflow() -> str:
    """The end of an error message of Keras 3 on JAX or torch: how to use TensorFlow instead."""
    first = (
        "" if installed("tensorflow") else "Install TensorFlow (pip install tensorflow) and "
    )
    return f"{first}set KERAS_BACKEND=tensorflow" if first else "Set KERAS_BACKEND=tensorflow"


def require_framework() -> None:
    """Raise an ImportError unless the framework that Keras 3 runs on is installed."""
    selected = selected_framework()
    if selected not in FRAMEWORKS or installed(selected):
        return
    others = [name for name in FRAMEWORKS if installed(name)]
    if not others:
        raise ImportError(
            "Keras 3 needs TensorFlow, JAX or torch, and none of them is installed. Install "
            "one: pip install tensorflow, pip install jax, or pip install torch."
        )
    by = f"{FRAMEWORK_SWITCH}={selected}" if os.environ.get(FRAMEWORK_SWITCH) else "keras.json"
    raise ImportError(
        f"Keras 3 is set to run on {FRAMEWORKS[selected]} (by {by}), which is "
        f"not installed; {' and '.join(FRAMEWORKS[name] for name in others)} can be used. Set "
        f"KERAS_BACKEND={others[0]}, or install it: pip install {selected}."
    )


def require_legacy_keras() -> None:
    """Raise an ImportError unless legacy Keras and TensorFlow are installed."""
    missing = [name for name in ("tensorflow", "tf_keras") if not installed(name)]
    if missing:
        raise ImportError(
            f"Legacy Keras, selected by {LEGACY_SWITCH}=1, needs {' and '.join(missing)}, "
            'which cannot be imported. Install both: pip install "tf-keras<2.22". Or unset '
            f"{LEGACY_SWITCH} to use Keras 3."
        )
