"""``--lr auto``, ``--lr find`` and ``--rank auto`` of ``tfimm-lora finetune``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfimm_lora.cli.app import note
from tfimm_lora.cli.parsing import AUTO, FIND
from tfimm_lora.finetuning.recipe import Recipe
from tfimm_lora.finetuning.run import CONFIG, Run
from tfimm_lora.finetuning.tuning.pictures import find_rate_for_pictures, tune_pictures

#: The minutes of a search.
MINUTES = 10.0


@dataclass(frozen=True)
class Automatic:
    """The words that stand for a setting, and the limits of a search.

    Attributes:
        rate: "auto", "find" or None.
        rank: "auto" or None.
        limits: ``minutes``, ``trials`` and ``storage`` of ``tune_pictures``, as far as given.

    Raises:
        ValueError: for limits without a search.
    """

    rate: str | None
    rank: str | None
    limits: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limits and not self.searches:
            raise ValueError(
                f"Received --tune-{next(iter(self.limits))} without a search; expected "
                "--lr auto, --rank auto, or both."
            )

    @property
    def searches(self) -> bool:
        """Whether there is a search."""
        return AUTO in (self.rate, self.rank)

    def apply(self, recipe: Recipe, out: str, resume: bool) -> Recipe:
        """Search for the settings, or take those that were found for a run that is resumed."""
        if self.rate == FIND:
            recipe = _with_found_rate(recipe, out, resume)
        if not self.searches:
            return recipe
        if self.rank is not None and self.rate is None:
            note(f"all ranks are tried with the learning rate {recipe.learning_rate:g}")
        tuned = tune_pictures(
            recipe,
            out,
            learning_rate=self.rate == AUTO,
            rank=self.rank == AUTO,
            resume=resume,
            say=note,
            **{"minutes": MINUTES, **self.limits},
        )
        assert tuned.recipe is not None
        return tuned.recipe


def _with_found_rate(recipe: Recipe, out: str, resume: bool) -> Recipe:
    if resume and (Path(out) / CONFIG).is_file():
        rate = Run.open(out).recipe["learning_rate"]
        note(f"the run has the learning rate {rate:g} already")
    else:
        curve = find_rate_for_pictures(recipe, say=note)
        rate = curve.suggestion
        note(f"learning rate {rate:g}, from one pass of {len(curve.rates)} steps")
    return dataclasses.replace(recipe, learning_rate=rate)
