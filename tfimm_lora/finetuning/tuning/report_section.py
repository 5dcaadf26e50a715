"""The section of the report about a search for settings."""

from __future__ import annotations

from tfimm_lora.finetuning.report.formatting import decimal, duration, percent
from tfimm_lora.finetuning.report.html import Html, drawing, joined, tag
from tfimm_lora.finetuning.report.sections import both, count, table
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.tuning.plot import draw_search
from tfimm_lora.finetuning.tuning.record import rank_key, read_search


def search(run: Run) -> Html | None:
    """What was tried to find the settings, if they were searched for."""
    found = read_search(run.path)
    if found is None:
        return None
    tuned = found[0]
    best = tuned.best
    searched = ["learning rate"] if tuned.rates[0] < tuned.rates[1] else []
    searched += ["rank"] if len(tuned.ranks) > 1 else []
    on = ""
    if tuned.pictures is not None:
        on = (
            f" They were trained on {tuned.pictures[0]:,} of the training pictures and "
            f"compared on {count(tuned.pictures[1], 'other')}; validation and test pictures "
            "were not used."
        )
    verb = "were" if len(searched) > 1 else "was"
    summary = (
        f"The {' and the '.join(searched)} {verb} chosen from "
        f"{count(len(tuned.trials), 'training')} with {count(tuned.epochs_trained, 'epoch')} "
        f"({duration(tuned.seconds)}): rate {best.learning_rate:g}, rank {best.rank}.{on} "
        "The best settings of the short trainings were trained again for longer."
    )
    rows = [
        [
            f"{x.learning_rate:g}",
            str(x.rank),
            str(x.epochs),
            "diverged" if x.value is None else decimal(x.value, 3),
            percent(x.metrics["val_accuracy"]) if "val_accuracy" in x.metrics else "",
            duration(x.seconds),
        ]
        for x in sorted(tuned.trials, key=lambda x: (-x.epochs, rank_key(x, tuned.monitor)))
    ]
    names = ("Rate", "Rank", "Epochs", tuned.monitor, "Accuracy", "Time")
    trials = table(names, rows, numbers=(1, 2, 3, 4, 5))
    plot = both(lambda file, dark: draw_search(tuned, file, dark=dark))
    return joined(
        tag("p", summary),
        tag(
            "div",
            tag("div", drawing(*plot, alt="Accuracy of each training over its learning rate")),
            tag("div", trials, class_="long rest"),
            class_="sides",
        ),
    )
