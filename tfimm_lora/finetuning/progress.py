"""Progress messages of a training on stderr: a bar, lines, or nothing."""

from __future__ import annotations

import sys
import time
from typing import Any

from tfimm_lora.backend.interface import Backend
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.validation import check_choice

KINDS = ("bar", "lines", "none")


class Reporter:
    """Reports the progress of a training."""

    def __init__(self, kind: str, epochs: int, steps: int) -> None:
        check_choice(kind, "verbose", KINDS)
        self.kind, self.epochs, self.steps = kind, epochs, steps
        self.started = 0.0
        self.bar: Any = None

    def callbacks(self, backend: Backend) -> list[Any]:
        """The Keras callbacks that report."""
        if self.kind == "none":
            return []
        if self.kind == "bar":
            self._create_bar()
        hooks: dict[str, Any] = {
            "on_epoch_begin": self._begin,
            "on_epoch_end": self._end,
            "on_train_end": self._close,
        }
        if self.bar:
            hooks["on_train_batch_end"] = self._batch
        return [backend.keras.callbacks.LambdaCallback(**hooks)]

    def _create_bar(self) -> None:
        progress = require("rich.progress", extra="cli", why="A progress bar")
        console = require("rich.console", extra="cli", why="A progress bar")
        self.bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            console=console.Console(stderr=True),
            transient=True,
        )
        self.task = self.bar.add_task(
            "train", total=self.steps, epoch=0, epochs=self.epochs, numbers=""
        )

    def _begin(self, epoch: int, logs: Any = None) -> None:
        self.started = time.monotonic()
        if self.bar:
            self.bar.start()
            self.bar.reset(self.task, epoch=epoch + 1)

    def _batch(self, batch: int, logs: Any = None) -> None:
        self.bar.update(self.task, completed=batch + 1, numbers=_metrics_text(logs))

    def _end(self, epoch: int, logs: Any = None) -> None:
        seconds = time.monotonic() - self.started
        line = f"epoch {epoch + 1}/{self.epochs}  {_metrics_text(logs)}  {seconds:.1f} s"
        if self.bar:
            self.bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _close(self, logs: Any = None) -> None:
        if self.bar:
            self.bar.stop()


def _metrics_text(logs: Any) -> str:
    return "  ".join(f"{name} {float(value):.4f}" for name, value in (logs or {}).items())
