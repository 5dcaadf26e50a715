"""``SharedBase``: a base model that several runs have in common, and whether a run fits it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tfimm_lora.finetuning.base.origin import weights_digest
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.run import Run


@dataclass(frozen=True)
class SharedBase:
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
    def of_run(cls, run: Run) -> SharedBase:
        """Open the base model of a run.

        Raises:
            FileNotFoundError, ValueError, ImportError: as ``Run.base``.
        """
        return cls(
            str(run.path),
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
