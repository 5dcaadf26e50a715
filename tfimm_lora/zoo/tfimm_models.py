"""Access to tfimm's registry of models by name, where tfimm can be used."""

from __future__ import annotations

import difflib
from typing import Any

from tfimm_lora.backend import installed, uses_legacy_keras


def import_tfimm() -> Any:
    """The module ``tfimm``.

    Raises:
        ImportError: if it is not installed.
        RuntimeError: if this process runs Keras 3, which tfimm cannot use.
    """
    if not installed("tfimm"):
        raise ImportError(
            "This function needs tfimm, which is not installed. Install it with: pip "
            "install --no-deps --ignore-requires-python tfimm==0.2.14 && pip install "
            "tf-keras markdown"
        )
    if not uses_legacy_keras():
        raise RuntimeError(
            "tfimm works on legacy Keras only: set the environment variable "
            "TF_USE_LEGACY_KERAS=1 before TensorFlow is imported."
        )
    import tfimm

    return tfimm


def require_known(tfimm: Any, model_name: str) -> None:
    """Raise a ValueError for a name that tfimm does not know; it lists the nearest."""
    if not tfimm.models.is_model(model_name):
        near = difflib.get_close_matches(model_name, tfimm.list_models(), n=5)
        raise ValueError(
            f"Received model_name={model_name!r}, which tfimm does not know. "
            + (f"Nearest: {', '.join(near)}. " if near else "")
            + "See list_models()."
        )
