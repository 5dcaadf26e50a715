"""Tables and plots of the study, in docs/explanation/study.md and docs/images/."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plan import (
    DEFAULTS,
    KINDS_METHODS,
    KINDS_SEEDS,
    LARGE,
    LARGE_EPOCHS,
    LARGE_SEEDS,
    LONGER_EPOCHS,
    PEFT_METHOD,
    PEFT_MODELS,
    REFERENCE,
    SEARCH_SEEDS,
    SEARCHED_RANKS,
    SETTINGS_SEEDS,
    THEIR_TASKS,
    VARIANTS,
    Plan,
    Results,
    Run,
)
from results import Searches

#: The two-sided 95 % quantile of Student's t for so many degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
MINUS = "\N{MINUS SIGN}"

#: What is compared with the best of the grid, and its title.
SEARCHED = {
    "best": "the search",
    "together": "its three best settings together",
    "mean update": "the mean of their updates",
}


class Score(NamedTuple):
    """The scores on the test pictures in percent by task and seed, and what training took."""

    accuracy: dict[str, dict[int, float]]
    rate: float
    trained: int
    parameters: int
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.of_task(task) for task in self.accuracy)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds."""
        seeds = zip(*(by_seed.values() for by_seed in self.accuracy.values()), strict=True)
        return statistics.stdev(statistics.mean(scores) for scores in seeds)

    def of_task(self, task: str) -> float:
        return statistics.mean(self.accuracy[task].values())

    def against(self, other: Score) -> tuple[float, float | None]:
        """Mean and 95 % interval (plus or minus) of the difference on the same seeds.

        The difference of a seed is that of the mean over the tasks. One seed has no interval.
        """
        seeds = sorted(set.intersection(*(set(a) for a in self.accuracy.values())))
        differences = [
            statistics.mean(self.accuracy[t][s] - other.accuracy[t][s] for t in self.accuracy)
            for s in seeds
        ]
        if len(differences) < 2:
            return differences[0], None
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return statistics.mean(differences), T95[len(differences) - 1] * error


class Study:
    """The results of a plan."""

    def __init__(self, plan: Plan, results: Results, searches: Searches | None = None) -> None:
        self.plan, self.results, self.searches = plan, results, searches or {}

    def score(
        self,
        method: str,
        tasks: Sequence[str],
        seeds: Iterable[int],
        rate: float | None = None,
        **settings: Any,
    ) -> Score | None:
        """The score of a method at a rate, or at its best; None if a run is missing."""
        if rate is None:
            rate = self.plan.best_rate(method, self.results)
        if rate is None:
            return None
        seeds = tuple(seeds)
        runs = {
            (task, seed): self.results.get(
                Run(self.plan.job(task, method, **settings), rate, seed)
            )
            for task in tasks
            for seed in seeds
        }
        if not runs or None in runs.values():
            return None
        first = runs[tasks[0], seeds[0]]
        accuracy = {
            task: {seed: 100 * runs[task, seed]["test_accuracy"] for seed in seeds}
            for task in tasks
        }
        # The first run of a job includes its compilation.
        seconds = sum(min(runs[task, s]["seconds"] for s in seeds) for task in tasks)
        return Score(accuracy, rate, first["trained"], first["parameters"], seconds)

    def scores(
        self,
        methods: Iterable[str],
        tasks: Sequence[str],
        seeds: Iterable[int],
        **settings: Any,
    ) -> dict[str, Score]:
        found = {m: self.score(m, tasks, seeds, **settings) for m in methods}
        return {m: score for m, score in found.items() if score is not None}

    # -- tables --------------------------------------------------------------------------

    def methods_table(self) -> str:
        """All methods on the first tasks."""
        plan = self.plan
        scores = self.scores(plan.methods, plan.tasks, plan.seeds)
        return self._table(scores, plan.tasks, costs=True)

    def variants_table(self) -> str:
        """The variants with the first seed, at the best rate of each."""
        plan = self.plan
        methods = (REFERENCE, *(m for m in plan.methods if m in VARIANTS))
        return self._table(
            self.scores(methods, plan.tasks, plan.seeds[:1]), plan.tasks, costs=True
        )

    def longer_table(self) -> str:
        plan = self.plan
        scores = self.scores(plan.longer_methods, plan.tasks, plan.seeds, epochs=LONGER_EPOCHS)
        return self._table(scores, plan.tasks, costs=True)

    def peft_table(self) -> str:
        """PEFT and this library, LoRA of rank 8 at the same rate."""
        plan = self.plan
        rate = plan.best_rate(REFERENCE, self.results)
        if rate is None:
            return ""
        rows = []
        for model in PEFT_MODELS:
            for task in THEIR_TASKS:
                found = [
                    self.score(method, (task,), plan.seeds, rate, model=model)
                    for method in (REFERENCE, PEFT_METHOD)
                ]
                if None in found:
                    continue
                ours, theirs = found
                cells = [f"{score.mean:.1f} ({score.spread:.1f})" for score in found]
                difference = _difference(*ours.against(theirs))
                time = f"{ours.seconds / theirs.seconds:.2f}"
                rows.append([f"{model}, {task}", *cells, difference, time])
        names = ["", REFERENCE, PEFT_METHOD, "difference", "time"]
        return _markdown(names, rows) if rows else ""

    def tasks_table(self) -> str:
        plan = self.plan
        return self._table(
            self.scores(plan.main, plan.other_tasks, plan.seeds), plan.other_tasks
        )

    def kind_table(self, task: str) -> str:
        return self._table(self.scores(KINDS_METHODS, (task,), KINDS_SEEDS), (task,))

    def model_table(self, model: str) -> str:
        plan = self.plan
        scores = self.scores(plan.main, THEIR_TASKS, plan.seeds, model=model)
        return self._table(scores, THEIR_TASKS, shares=True)

    def large_table(self) -> str:
        scores = self.scores(
            self.plan.large_methods, (LARGE,), LARGE_SEEDS, epochs=LARGE_EPOCHS
        )
        return self._table(scores, (LARGE,))

    def settings_table(self) -> str:
        """Changed settings of the training."""
        plan = self.plan
        scores = {"as everywhere": self.score(REFERENCE, plan.tasks, SETTINGS_SEEDS)}
        for settings in plan.settings:
            changed = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items())
            scores[changed] = self.score(REFERENCE, plan.tasks, SETTINGS_SEEDS, **settings)
        return _against_first(scores, plan.tasks)

    def defaults_table(self) -> str:
        """The defaults of ``finetune``, before and since."""
        tasks = self.plan.other_tasks
        scores = {
            name: self.score(method, tasks, SETTINGS_SEEDS, rate, **settings)
            for name, (method, rate, settings) in DEFAULTS.items()
        }
        return _against_first(scores, tasks)

    def search_table(self) -> str:
        """The best point of the grid, and what searches found; what both cost."""
        plan, results = self.plan, self.results
        tasks, seeds = plan.tasks, SEARCH_SEEDS
        methods = [f"LoRA, rank {rank}" for rank in SEARCHED_RANKS]
        rates = {m: plan.best_rate(m, results) for m in methods if m in plan.methods}
        searched = all((task, seed) in self.searches for task in tasks for seed in seeds)
        if not searched or not rates or None in rates.values():
            return ""
        best = max(rates, key=lambda m: plan.score(m, rates[m], results))
        grid = [
            Run(plan.job(task, method), rate, plan.seeds[0])
            for task in tasks
            for method in rates
            for rate in plan.rates(method, results)
        ]
        first = self.score(best, tasks, seeds)
        if first is None:
            return ""
        rows = [
            [f"the best of the grid ({best}, {rates[best]:g})", *_cells(first, tasks), "", ""]
        ]
        for name, title in SEARCHED.items():
            found = {t: {s: self.searches[t, s][name] for s in seeds} for t in tasks}
            accuracy = {
                t: {s: 100 * x["accuracy"] for s, x in by_seed.items()}
                for t, by_seed in found.items()
            }
            score = Score(accuracy, 0.0, 0, 0, 0.0)
            errors = [
                x["calibration_error"] for by_seed in found.values() for x in by_seed.values()
            ]
            rows.append(
                [
                    title,
                    *_cells(score, tasks),
                    _difference(*score.against(first)),
                    f"{statistics.mean(errors):.3f}",
                ]
            )
        took = [self.searches[t, s]["search_seconds"] for t in tasks for s in seeds]
        share = sum(took) / len(seeds) / sum(results[run]["seconds"] for run in grid)
        table = _markdown(["", *tasks, "mean", "difference", "calibration error"], rows)
        return (
            f"{table}\n\nThe grid has {len(grid) // len(tasks)} trainings for each task. A "
            f"search took {100 * share:.0f} % of its processor time."
        )

    def _table(
        self,
        scores: dict[str, Score],
        tasks: Sequence[str],
        *,
        costs: bool = False,
        shares: bool = False,
    ) -> str:
        if not scores:
            return ""
        reference, full = scores.get(REFERENCE), scores.get("everything")
        rows = []
        for method, score in scores.items():
            row = [method, *_cells(score, tasks)]
            if reference is None or method == REFERENCE:
                row.append("")
            else:
                row.append(_difference(*score.against(reference)))
            if costs or shares:
                base = full.parameters if full is not None else score.parameters
                row.append(f"{100 * score.trained / base:.1f} %")
            if costs:
                row.append(f"{score.rate:g}")
                row.append(f"{score.seconds / full.seconds:.2f}" if full is not None else "")
            rows.append(row)
        names = list(tasks) if len(tasks) == 1 else [*tasks, "mean"]
        names = ["", *names, f"against {REFERENCE}"]
        names += ["trained"] if costs or shares else []
        return _markdown([*names, *(["rate", "time"] if costs else [])], rows)

    # -- plots ---------------------------------------------------------------------------

    def draw(self, folder: Path) -> None:
        """Accuracy over the learning rate and over the rank."""
        import matplotlib

        matplotlib.use("svg")
        # The same file for the same results.
        matplotlib.rcParams["svg.hashsalt"] = "study"
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
        for method in (
            "everything",
            "LoRA, rank 1",
            REFERENCE,
            "LoRA, rank 64",
            "normalization",
        ):
            points = [
                (rate, 100 * score[0])
                for rate in self.plan.rates(method, self.results)
                if (score := self._tested(method, rate)) is not None
            ]
            if points:
                left.plot(*zip(*points, strict=True), marker="o", label=method)
        left.set(xscale="log", xlabel="learning rate", ylabel="test accuracy in %")
        left.legend(frameon=False)
        plan, ranks = self.plan, []
        for method in plan.methods:
            score = self.score(method, plan.tasks, plan.seeds)
            if score is not None and method.removeprefix("LoRA, rank ").isdigit():
                ranks.append((int(method.removeprefix("LoRA, rank ")), score.mean))
        if ranks:
            right.plot(*zip(*sorted(ranks), strict=True), marker="o", label="LoRA")
        for method, style in (("everything", "--"), ("classifier only", ":")):
            score = self.score(method, plan.tasks, plan.seeds)
            if score is not None:
                right.axhline(score.mean, linestyle=style, color="0.4", label=method)
        right.set(xscale="log", xlabel="rank")
        right.set_xticks([1, 4, 8, 16, 64], [1, 4, 8, 16, 64])
        right.legend(frameon=False)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "study.svg", metadata={"Date": None})

    def _tested(self, method: str, rate: float) -> tuple[float] | None:
        runs = [
            self.results.get(Run(self.plan.job(task, method), rate, self.plan.seeds[0]))
            for task in self.plan.tasks
        ]
        if None in runs:
            return None
        return (statistics.mean(run["test_accuracy"] for run in runs),)

    def parts(self) -> Iterator[tuple[str, str]]:
        """The names of the generated parts of the page, and their text."""
        yield "methods", self.methods_table()
        yield "variants", self.variants_table()
        yield "longer", self.longer_table()
        yield "peft", self.peft_table()
        yield "tasks", self.tasks_table()
        for model in self.plan.other_models:
            yield model, self.model_table(model)
        yield "settings", self.settings_table()
        yield "defaults", self.defaults_table()
        yield "search", self.search_table()
        yield "large", self.large_table()
        for task in self.plan.kinds:
            yield task, self.kind_table(task)


def write(plan: Plan, results: Results, folder: Path, searches: Searches | None = None) -> None:
    """Rewrite the tables between their markers, and the figure."""
    study = Study(plan, results, searches)
    page = folder / "explanation" / "study.md"
    text = page.read_text(encoding="utf-8")
    for name, table in study.parts():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n{table or 'Not measured yet.'}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    study.draw(folder / "images")


def _against_first(scores: dict[str, Score | None], tasks: Sequence[str]) -> str:
    """A table with the differences from the first score; "" without it."""
    first, *_ = scores.values()
    if first is None:
        return ""
    rows = []
    for name, score in scores.items():
        if score is not None:
            difference = "" if score is first else _difference(*score.against(first))
            rows.append([name, *_cells(score, tasks), difference])
    return _markdown(["", *tasks, "mean", "difference"], rows)


def _cells(score: Score, tasks: Sequence[str]) -> list[str]:
    cells = [f"{score.of_task(task):.1f}" for task in tasks]
    return cells if len(tasks) == 1 else [*cells, f"**{score.mean:.1f}**"]


def _difference(mean: float, interval: float | None) -> str:
    plus_or_minus = "" if interval is None else f" ± {interval:.1f}"
    return f"{mean:+.1f}{plus_or_minus}".replace("-", MINUS)


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
