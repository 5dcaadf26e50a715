"""``tensorboard``: the callback that writes logs for TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tfimm_lora.backend import backend_of, installed


def tensorboard(model: Any, folder: Path) -> list[Any]:
    """The Keras callback that writes TensorBoard logs, if TensorBoard is installed.

    That of Keras needs TensorFlow. Without it, the metrics of each epoch are written to the
    same files under the same names.
    """
    if not installed("tensorboard"):
        return []
    callbacks = backend_of(model).keras.callbacks
    if installed("tensorflow"):
        return [callbacks.TensorBoard(str(folder), write_graph=False)]
    writers = _Writers(folder)
    return [
        callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: writers.write(epoch, logs or {}),
            on_train_end=lambda logs: writers.close(),
        )
    ]


class _Writers:
    """Event files for training and validation, which are created when first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[str, Any] = {}

    def write(self, epoch: int, logs: dict[str, Any]) -> None:
        """Write the metrics of an epoch: "val_loss" as "epoch_loss" of the validation."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, value in logs.items():
            short = name.removeprefix("val_")
            part = "train" if short == name else "validation"
            number = Summary.Value(tag=f"epoch_{short}", simple_value=float(value))
            event = Event(wall_time=time.time(), step=epoch, summary=Summary(value=[number]))
            self._of(part).add_event(event)
        for writer in self.writers.values():
            writer.flush()

    def _of(self, part: str) -> Any:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if part not in self.writers:
            self.writers[part] = EventFileWriter(str(self.folder / part))
        return self.writers[part]

    def close(self) -> None:
        """Close the files."""
        while self.writers:
            self.writers.popitem()[1].close()
