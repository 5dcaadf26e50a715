"""Access to tfimm and its registry of model names."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import installed, uses_legacy_keras
from tfimm_lora.utils.suggestions import close_names


def import_tfimm() -> Any:
    """Import tfimm.

    Raises:
        ImportError: If it, TensorFlow or legacy Keras is not installed.
        RuntimeError: If this process runs Keras 3, which tfimm cannot use.
    """
    missing = [name for name in ("tfimm", "tensorflow") if not installed(name)]
    if missing:
        raise ImportError(
            f"The models of tfimm need {' and '.join(missing)}, which cannot be imported. "
            "Install them with legacy Keras: pip install --no-deps --ignore-requires-python "
            'tfimm==0.2.14 && pip install "tf-keras<2.22" markdown. The models of '
            "keras.applications, such as applications/MobileNetV2, do not need tfimm."
        )
    if not uses_legacy_keras():
        raise RuntimeError(
            "This process runs Keras 3, but tfimm needs legacy Keras. Set the environment "
            "variable TF_USE_LEGACY_KERAS=1 before TensorFlow is imported."
        )
    import tfimm

    return tfimm


def require_known(tfimm: Any, model_name: str) -> None:
    """Raise a ValueError that suggests similar names if tfimm does not have this name."""
    if not tfimm.models.is_model(model_name):
        near = close_names(model_name, tfimm.list_models())
        raise ValueError(
            f"Received model_name={model_name!r}; expected the name of a tfimm model. "
            + (f"Nearest: {', '.join(near)}. " if near else "")
            + "See list_models()."
        )
