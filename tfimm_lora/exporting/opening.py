"""How to open an exported Keras file in a process without this package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from tfimm_lora.backend import backend_of

#: The variable that makes ``tf.keras``, which tfimm uses, legacy Keras.
LEGACY = {"TF_USE_LEGACY_KERAS": "1"}

#: The name of the module of classes that were defined in a script or notebook.
_SCRIPT = "__main__"


def opening(model: Any, needs: Sequence[str], name: str) -> dict[str, Any]:
    """How to open a Keras file, as plain values for JSON.

    Args:
        model: The exported model.
        needs: The packages that are needed to load the file.
        name: The name of the file.

    Returns:
        A dict with "keras" ("Keras 3" or "legacy Keras"), "packages" (the packages to install,
        with the installed versions or None), "environment" (the variables to set before Python
        is started) and "code".
    """
    keras = backend_of(model).keras.__name__
    is_legacy = keras == "tf_keras"
    others = [module for module in needs if module not in (keras, _SCRIPT)]
    lines = [f"import {module}" for module in (*others, keras)]
    lines.append(f"model = {keras}.models.load_model({name!r}, compile=False)")
    return {
        "keras": "legacy Keras" if is_legacy else "Keras 3",
        "packages": dict(_distribution(module) for module in (keras, *others)),
        "environment": dict(LEGACY) if is_legacy else {},
        "code": "\n".join(lines),
    }


def _distribution(module: str) -> tuple[str, str | None]:
    """The name of the package that contains a module, to install it, and its version."""
    name = module.replace("_", "-")
    try:
        return name, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, None


def instructions(open_with: Mapping[str, Any], needs: Sequence[str]) -> str:
    """The result of ``opening`` as text: what to install and set, and the code to run."""
    packages = ", ".join(
        f"{name} {version}" if version else name
        for name, version in open_with["packages"].items()
    )
    variables = "".join(f" {k}={v}" for k, v in open_with["environment"].items())
    first = f"To open the file, install {packages}"
    first += f", set{variables} before Python starts" if variables else ""
    first += ", import the classes of your script" if _SCRIPT in needs else ""
    code = "".join(f"\n    {line}" for line in open_with["code"].splitlines())
    return f"{first}, and run in its folder:{code}"
