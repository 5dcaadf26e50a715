"""A note about runs whose training is not complete."""

from __future__ import annotations

from tfimm_lora.cli.app import note
from tfimm_lora.finetuning.run import Run


def warn_if_unfinished(run: Run) -> None:
    """Print a warning if fewer epochs are complete than requested and none stopped early."""
    if run.unfinished is None or not run.history:
        return  # without an epoch there is no model, which is an error of its own
    done, requested = run.unfinished
    note(
        f"warning: the run in {run.path} is unfinished: {done} of {requested} epochs are "
        "complete. The best of them is used. Resume it with: "
        f"tfimm-lora finetune --out {run.path} --resume"
    )
