"""``ServedBase``: the base model that all adapters share, and whether a run fits it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tfimm_lora.finetuning.base.names import is_model_file
from tfimm_lora.finetuning.base.origin import file_hash, weights_digest
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.run import CONFIG, Run
from tfimm_lora.serving.adapter_folder import Entry
from tfimm_lora.serving.settings import ServingSettings


@dataclass(frozen=True)
class ServedBase:
    """A base model.

    Attributes:
        name: Its name or path.
        model: The ordinary model, which returns logits.
        preprocessing: How pictures become its input.
        sha256: The SHA-256 of the model or weight file; None for a model by name.
        has_classifier: Whether its classifier is trained. That of a run is new and random if
            the number of classes changed: only its adapter has a trained one.
    """

    name: str
    model: Any
    preprocessing: Preprocessing
    sha256: str | None
    has_classifier: bool

    @classmethod
    def open(cls, settings: ServingSettings) -> ServedBase:
        """Open the base model of the settings.

        Raises:
            ValueError: if options for a model are given with a run.
            ValueError, OSError, ImportError, RuntimeError: as ``Run.base`` and
                ``open_base_model``.
        """
        if (Path(settings.base) / CONFIG).is_file():
            return cls._of_run(settings)
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
        return cls(settings.base, opened.model, opened.preprocessing, sha256, True)

    @classmethod
    def _of_run(cls, settings: ServingSettings) -> ServedBase:
        given = [
            f"--{name.replace('_', '-')}"
            for name in ("weights", "input_size", "normalisation")
            if getattr(settings, name) is not None
        ]
        if given:
            raise ValueError(
                f"Received {' and '.join(given)} with the run {settings.base}; expected none "
                "of them: the base model, the size and the normalization are those of the run."
            )
        run = Run.open(settings.base)
        return cls(
            os.fspath(settings.base),
            run.base(),
            run.preprocessing,
            run.facts.get("base_sha256"),
            not run.facts["new_classifier"],
        )

    @cached_property
    def digests(self) -> tuple[str, str]:
        """The SHA-256 of the weights with and without the classifier."""
        whole = weights_digest(self.model, without_classifier=False)
        return whole, weights_digest(self.model, without_classifier=True)

    def problems(self, entry: Entry) -> list[str]:
        """Why an adapter cannot be served on this model, as far as its run tells."""
        problems = [] if entry.run is None else self.differences(entry.run)
        if not self.has_classifier and not entry.adapter.modules:
            problems.append(
                "it has no classifier, and that of the base model is new and not trained; "
                "serve it on the model that it was trained on"
            )
        return problems

    def differences(self, run: Run) -> list[str]:
        """What differs between the base, picture size or preprocessing of a run and these.

        Returns:
            A sentence for each difference. None if an adapter of the run gives the same
            outputs on this base.
        """
        found = []
        theirs, mine = run.preprocessing.to_dict(), self.preprocessing.to_dict()
        for name in mine:
            if theirs[name] != mine[name]:
                found.append(f"{name} is {theirs[name]}, expected {mine[name]}")
        facts = run.facts
        if self.sha256 != facts.get("base_sha256"):
            found.append(
                f"the file of its base model {run.recipe['model']} has the SHA-256 "
                f"{facts.get('base_sha256')}, expected {self.sha256}"
            )
        elif self.sha256 is None and facts.get("base_digest") not in self.digests:
            found.append(
                f"the weights of its base model {run.recipe['model']} have the SHA-256 "
                f"{facts.get('base_digest')}, expected {' or '.join(self.digests)}"
            )
        return found
