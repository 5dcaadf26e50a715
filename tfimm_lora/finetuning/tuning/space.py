"""``Space``: the settings of a search, and those that are tried first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tfimm_lora.config import LoRAConfig
from tfimm_lora.validation import check_number, check_rank

#: The range of rates in which LoRA trains with AdamW.
RATES = (1e-4, 3e-2)
#: Rates that often work. They are tried first, after the default.
USUAL_RATES = (1e-3, 3e-3, 1e-2)


def usual_ranks() -> tuple[int, ...]:
    """The ranks to choose from: the default, twice and four times as much."""
    rank = int(LoRAConfig().lora_rank)
    return rank, 2 * rank, 4 * rank


@dataclass(frozen=True)
class Space:
    """The rates and ranks to choose from.

    Attributes:
        rates: The lowest and the highest rate; the same number twice if it is not searched.
        ranks: The ranks; one if it is not searched.
    """

    rates: tuple[float, float]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, learning_rate: Any, rank: Any) -> Space:
        """Create a space from a number or a range, and from a rank or several.

        Raises:
            TypeError, ValueError: for anything else.

        Example:
            >>> from tfimm_lora.finetuning.tuning.space import Space
            >>> Space.of((1e-3, 1e-2), 4)
            Space(rates=(0.001, 0.01), ranks=(4,))
        """
        is_range = isinstance(learning_rate, Sequence) and not isinstance(learning_rate, str)
        if is_range and len(learning_rate) != 2:
            raise ValueError(
                f"Received learning_rate={learning_rate!r}; expected a number, or the lowest "
                "and the highest rate to search."
            )
        low, high = learning_rate if is_range else (learning_rate, learning_rate)
        for value in (low, high):
            check_number(value, "learning_rate", 0, exclusive=True)
        if low > high or (is_range and low == high):
            raise ValueError(
                f"Received learning_rate={learning_rate!r}; expected the lowest rate first, "
                "and a higher one. Pass one number for a rate that is not searched."
            )
        ranks = (
            tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else rank
        )
        ranks = ranks if isinstance(ranks, tuple) else (ranks,)
        for value in ranks:
            check_rank(value, "rank")
        if len(set(ranks)) < len(ranks) or not ranks:
            raise ValueError(
                f"Received rank={rank!r}; expected different ranks to choose from."
            )
        space = cls((float(low), float(high)), tuple(int(value) for value in ranks))
        if not space.searches_rate and not space.searches_rank:
            raise ValueError(
                f"Received learning_rate={learning_rate!r} and rank={rank!r}; expected a range "
                "of rates, such as (1e-4, 3e-2), or several ranks, or both. There is nothing "
                "to search."
            )
        return space

    @property
    def searches_rate(self) -> bool:
        """Whether there are several rates."""
        return self.rates[0] < self.rates[1]

    @property
    def searches_rank(self) -> bool:
        """Whether there are several ranks."""
        return len(self.ranks) > 1

    def usual_trials(self) -> int:
        """How many settings to try: six, or all if there are fewer."""
        return 6 if self.searches_rate else len(self.ranks)

    def starts(self, rate: float | None, rank: int | None) -> list[tuple[float, int]]:
        """The settings to try first: the default, usual rates, and the other ranks.

        The rates are tried with one rank, and the other ranks with a middle rate, so that two
        settings differ in one of both.

        Args:
            rate, rank: The default. None, or what is not in the space, stands for the usual
                values.

        Example:
            >>> from tfimm_lora.finetuning.tuning.space import Space
            >>> Space((1e-4, 3e-2), (4, 8)).starts(1e-3, 4)
            [(0.001, 4), (0.003, 4), (0.01, 4), (0.003, 8)]
            >>> Space((1e-3, 1e-3), (4, 8, 16)).starts(1e-3, 8)
            [(0.001, 8), (0.001, 4), (0.001, 16)]
        """
        low, high = self.rates
        first, *others = sorted(self.ranks, key=lambda x: x != rank)
        wanted = ([] if rate is None else [rate]) + list(USUAL_RATES)
        rates = [x for x in dict.fromkeys(wanted) if low <= x <= high]
        if (
            not rates
        ):  # or the middle of the range, which is that of a rate that is not searched
            rates = [low if low == high else float(f"{math.sqrt(low * high):.2g}")]
        middle = sorted(rates)[len(rates) // 2]
        return [(x, first) for x in rates] + [(middle, x) for x in others]

    def __str__(self) -> str:
        rates = f"learning rate ({self.rates[0]:g} to {self.rates[1]:g})"
        ranks = f"rank ({', '.join(map(str, self.ranks))})"
        searched = [rates] if self.searches_rate else []
        return " and ".join(searched + ([ranks] if self.searches_rank else []))
