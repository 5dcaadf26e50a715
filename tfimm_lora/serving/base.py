"""Open the base model that is served, and say why an adapter cannot be served on it."""

from __future__ import annotations

from pathlib import Path

from tfimm_lora.finetuning.base.names import is_model_file
from tfimm_lora.finetuning.base.origin import file_hash
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.run import CONFIG, Run
from tfimm_lora.finetuning.shared_base import SharedBase
from tfimm_lora.serving.adapter_folder import Entry
from tfimm_lora.serving.settings import ServingSettings


def open_base(settings: ServingSettings) -> SharedBase:
    """Open the base model of the settings.

    Raises:
        ValueError: if options for a model are given with a run.
        ValueError, OSError, ImportError, RuntimeError: as ``Run.base`` and
            ``open_base_model``.
    """
    if (Path(settings.base) / CONFIG).is_file():
        _require_no_options(settings)
        return SharedBase.of_run(Run.open(settings.base))
    has_file = settings.weights is not None or is_model_file(settings.base)
    opened = open_base_model(
        settings.base,
        pretrained=not has_file,
        weights=settings.weights,
        input_size=settings.input_size,
        normalisation=settings.normalisation,
    )
    file = settings.weights or settings.base
    sha256 = file_hash(file) if has_file else None
    return SharedBase(settings.base, opened.model, opened.preprocessing, sha256, True)


def _require_no_options(settings: ServingSettings) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("weights", "input_size", "normalisation")
        if getattr(settings, name) is not None
    ]
    if given:
        raise ValueError(
            f"Received {' and '.join(given)} with the run {settings.base}; expected none of "
            "them: the base model, the size and the normalization are those of the run."
        )


def problems_of(base: SharedBase, entry: Entry) -> list[str]:
    """Why an adapter cannot be served on a base model, as far as its run tells."""
    problems = [] if entry.run is None else base.differences(entry.run)
    if not base.has_classifier and not entry.adapter.modules:
        problems.append(
            "it has no classifier, and that of the base model is new and not trained; serve it "
            "on the model that it was trained on"
        )
    return problems
