"""What the study runs: which methods on which tasks and models, with which rates and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

#: The first learning rates of methods. Others follow outward as long as the best is at an edge.
FULL, LORA, SMALL = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
GRID = (3e-5, *FULL, *SMALL, 1e-1)

#: Without LoRA, and LoRA with different ranks and layers.
BASIC = {
    "everything": FULL,
    "LoRA, rank 8": LORA,
    "LoRA, rank 16": LORA,
    "LoRA, all convolutions": LORA,
    "LoRA, rank 4": LORA,
    "everything, statistics too": FULL,
    "LoRA, statistics too": LORA,
    "normalization": SMALL,
    "classifier only": SMALL,
    "LoRA, rank 64": LORA,
    "LoRA, rank 1": LORA,
    "biases": SMALL,
}
VARIANTS = {
    "LoRA, all convolutions, rank 4": LORA,
    "LoRA and biases": LORA,
    "PiSSA": LORA,
    "LoRA+": LORA,
    "DoRA": LORA,
    "rsLoRA": LORA,
    "EVA": LORA,
    "CoLoRA": LORA,
    "LoRA-GA": LORA,
    "AdaLoRA": LORA,
    "LoKr": LORA,
    "LoHa": LORA,
    "LoHa, rank 4": LORA,
    "LoHa, start of LoRA": LORA,
}
RATES = {**BASIC, **VARIANTS}
REFERENCE = "LoRA, rank 8"
#: A variant whose validation accuracy with the first seed is lower than the reference's by more
#: than this gets no further seeds.
MARGIN = 0.01
#: Methods that are also trained for longer.
LONGER_EPOCHS = 20
LONGER_METHODS = ("everything", "everything, statistics too", REFERENCE, "LoRA, rank 16")
LONGER_METHODS = (*LONGER_METHODS, "LoHa", "EVA")
MODEL = "efficientnet_lite0"
TASKS = ("garments", "changed digits", "stamps")
SEEDS = (0, 1, 2, 3, 4)
#: The height and width of the pictures. Digits have 8 x 8 pixels.
SIZE, DIGITS, PHOTOGRAPHS = 64, 48, 96

#: Methods that are compared beyond these tasks and this model.
MAIN = ("classifier only", "normalization", "everything", "LoRA, rank 4", REFERENCE)
MAIN = (*MAIN, "LoRA, all convolutions", "EVA")
OTHER_TASKS = ("digits", "textures")
OTHER_MODELS, THEIR_TASKS = ("mobilenet_v2_100", "efficientnet_lite2"), ("garments", "stamps")
#: LoRA of rank 8 with PEFT on timm's models; see ``with_peft.py``.
PEFT_METHOD, PEFT_MODELS = "PEFT, rank 8", ("efficientnet_lite0", "mobilenet_v2_100")
#: Other tasks than classifications. Their scores are the mean average precision, R2 and the
#: mean IoU.
KINDS = ("properties of digits", "angles of digits", "digits on photographs")
KINDS_SEEDS = (0, 1, 2)
KINDS_METHODS = ("classifier only", "everything", REFERENCE)
LARGE, LARGE_SEEDS, LARGE_EPOCHS = "10,000 garments", (0, 1, 2), 3
LARGE_METHODS = ("classifier only", "everything", REFERENCE, "LoRA, rank 64")
LARGE_METHODS = (*LARGE_METHODS, "LoRA, all convolutions")

#: Settings of the training with LoRA that are changed.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"augmentation": "light"},
    {"augmentation": "strong"},
    {"epochs": 5},
    {"epochs": 20},
    {"epochs": 20, "augmentation": "light"},
    {"epochs": 20, "augmentation": "strong"},
    {"clip_norm": 0.0},
    {"clip_norm": 3.0},
    {"clip_norm": 10.0},
    {"warmup": 0.0},
    {"batch": 16},
    {"batch": 64},
    {"weight_decay": 0.0},
    {"weight_decay": 0.1},
    {"epochs": 40},
)
#: So many of them are measured before the other methods.
FIRST_SETTINGS = 6
#: The defaults of ``finetune``, before the study and since: the method, its rate, settings.
DEFAULTS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "before": ("LoRA, rank 4", 1e-3, {"augmentation": "strong", "clip_norm": 0.0}),
    "since": (REFERENCE, 3e-3, {"augmentation": "light", "epochs": 20}),
}
SETTINGS_SEEDS = (0, 1, 2)
#: For the comparison of a search with the grid of these ranks.
SEARCHED_RANKS, SEARCH_SEEDS = (4, 8, 16), (0, 1, 2)


class Job(NamedTuple):
    """What the runs of one compiled model have in common."""

    task: str
    method: str
    model: str = MODEL
    size: int = SIZE
    epochs: int = 10
    batch: int = 32
    augmentation: str = "none"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0


class Run(NamedTuple):
    job: Job
    rate: float
    seed: int


Results = dict[Run, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a study. ``QUICK`` is a small one, to see that all of it works."""

    methods: tuple[str, ...] = tuple(RATES)
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = SEEDS
    main: tuple[str, ...] = MAIN
    other_tasks: tuple[str, ...] = OTHER_TASKS
    other_models: tuple[str, ...] = OTHER_MODELS
    longer_methods: tuple[str, ...] = LONGER_METHODS
    large_methods: tuple[str, ...] = LARGE_METHODS
    kinds: tuple[str, ...] = KINDS
    settings: tuple[dict[str, Any], ...] = SETTINGS
    size: int | None = None
    epochs: int = 10

    def job(self, task: str, method: str, **settings: Any) -> Job:
        usual = DIGITS if task.endswith("digits") else SIZE
        size = self.size or (PHOTOGRAPHS if task.endswith("photographs") else usual)
        return Job(task, method, **{"size": size, "epochs": self.epochs, **settings})

    def due(self, results: Results) -> list[Run]:
        """The runs that are still to be done, as far as they can be known now."""
        return [run for run in self._runs(results) if run not in results]

    def _runs(self, results: Results) -> Iterator[Run]:
        """All of them, the most useful first."""
        basic = [method for method in self.methods if method in BASIC]
        yield from self._compared(basic[:3], results)
        for settings in self.settings[:FIRST_SETTINGS]:
            yield from self._at_best(REFERENCE, self.tasks, SETTINGS_SEEDS, results, **settings)
        for method in KINDS_METHODS:
            yield from self._at_best(method, self.kinds, KINDS_SEEDS, results)
        for method, rate, settings in DEFAULTS.values():
            for task in self.other_tasks:
                for seed in SETTINGS_SEEDS:
                    yield Run(self.job(task, method, **settings), rate, seed)
        yield from self._compared(basic[3:], results)
        for method in self.main:
            yield from self._at_best(method, self.other_tasks, self.seeds, results)
        for method in self.longer_methods:
            yield from self._at_best(
                method, self.tasks, self.seeds, results, epochs=LONGER_EPOCHS
            )
        variants = [method for method in self.methods if method in VARIANTS]
        for method in variants:
            yield from self._choice(method, results)
        for method in variants:
            if self.is_worth_repeating(method, results):
                yield from self._at_best(method, self.tasks, self.seeds, results)
        for model in self.other_models:
            for method in self.main:
                yield from self._at_best(method, THEIR_TASKS, self.seeds, results, model=model)
        for settings in self.settings[FIRST_SETTINGS:]:
            yield from self._at_best(REFERENCE, self.tasks, SETTINGS_SEEDS, results, **settings)
        for method in self.large_methods:
            yield from self._at_best(
                method, (LARGE,), LARGE_SEEDS, results, epochs=LARGE_EPOCHS
            )

    def _compared(self, methods: Iterable[str], results: Results) -> Iterator[Run]:
        """The choice of a rate, and all seeds at the chosen one."""
        for method in methods:
            yield from self._choice(method, results)
            yield from self._at_best(method, self.tasks, self.seeds, results)

    def _choice(self, method: str, results: Results) -> Iterator[Run]:
        """The choice of a rate, with the first seed."""
        for rate in self.rates(method, results):
            for task in self.tasks:
                yield Run(self.job(task, method), rate, self.seeds[0])

    def _at_best(
        self,
        method: str,
        tasks: Iterable[str],
        seeds: Iterable[int],
        results: Results,
        **settings: Any,
    ) -> Iterator[Run]:
        rate = self.best_rate(method, results)
        if rate is not None:
            for task in tasks:
                for seed in seeds:
                    yield Run(self.job(task, method, **settings), rate, seed)

    def peft_runs(self, results: Results) -> list[Run]:
        """The runs of PEFT, at the rate of the reference."""
        rate = self.best_rate(REFERENCE, results)
        if rate is None:
            raise ValueError("The study has no rate yet. Run study.py first.")
        jobs = [
            self.job(task, PEFT_METHOD, model=model)
            for model in PEFT_MODELS
            for task in THEIR_TASKS
        ]
        return [Run(job, rate, seed) for job in jobs for seed in self.seeds]

    def rates(self, method: str, results: Results) -> list[float]:
        """The rates to try: the first ones, and outward as long as the best is at an edge."""
        rates = sorted(RATES[method])
        while True:
            scores = [self.score(method, rate, results) for rate in rates]
            if None in scores:
                return rates
            best = scores.index(max(scores))
            low, high = GRID.index(rates[0]), GRID.index(rates[-1])
            if best == 0 and low > 0:
                rates.insert(0, GRID[low - 1])
            elif best == len(rates) - 1 and high + 1 < len(GRID):
                rates.append(GRID[high + 1])
            else:
                return rates

    def score(self, method: str, rate: float, results: Results) -> tuple[float, float] | None:
        """Accuracy on the validation pictures of the first seed, mean of the tasks; at equal
        accuracy, the lower loss decides. None if there are runs to do."""
        found = [
            results.get(Run(self.job(task, method), rate, self.seeds[0])) for task in self.tasks
        ]
        if None in found:
            return None
        accuracy, loss = (
            sum(r[name] for r in found) / len(found) for name in ("val_accuracy", "val_loss")
        )
        return round(accuracy, 6), -loss

    def is_worth_repeating(self, method: str, results: Results) -> bool:
        """Whether a variant is close to the reference on the validation pictures, or better."""
        rates = [self.best_rate(m, results) for m in (method, REFERENCE)]
        if None in rates:
            return False
        ours, reference = (
            self.score(m, rate, results)
            for m, rate in zip((method, REFERENCE), rates, strict=True)
        )
        return ours[0] >= reference[0] - MARGIN

    def best_rate(self, method: str, results: Results) -> float | None:
        """The rate that is best on the validation pictures, when all are known."""
        rates = self.rates(method, results)
        scores = {rate: self.score(method, rate, results) for rate in rates}
        return None if None in scores.values() else max(scores, key=lambda rate: scores[rate])


QUICK = Plan(
    methods=("classifier only", REFERENCE),
    tasks=("digits",),
    seeds=(0,),
    main=(),
    longer_methods=(),
    other_tasks=(),
    other_models=(),
    large_methods=(),
    kinds=(),
    settings=(),
    size=32,
    epochs=1,
)
