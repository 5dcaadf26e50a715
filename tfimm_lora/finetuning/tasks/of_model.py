"""The task that a model is trained or evaluated for."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.model.output_activation import PROBABILITIES, output_activation
from tfimm_lora.model.state import record_task, recorded_task


def checked_task(model: Any, task: Task | None) -> Task:
    """The task to train or evaluate a model for: the given one, or a classification.

    Raises:
        TypeError: if ``task`` is something else.
        ValueError: if no task is given for a model of another task than a classification.
    """
    if task is None:
        record = recorded_task(model)
        if record is not None and record.name != Classification.name:
            raise ValueError(
                f"Received model '{model.name}', which was fine-tuned for the task "
                f"{record.name!r} with the labels {', '.join(record.labels)}, without a task; "
                "expected task=... Pass Run.task of its run, or, for another task, a new one."
            )
        return Classification()
    if not isinstance(task, Task):
        raise TypeError(
            f"Received task={task!r}; expected an instance of a task, such as "
            "MultiLabel(('cat', 'dog'))."
        )
    return task


def task_to_train(model: Any, task: Task | None, loss: Any) -> Task:
    """The task to train a model for, with a loss of the user, or None for that of the task.

    Raises:
        TypeError, ValueError: as ``checked_task``; if a softmax or sigmoid changes the outputs
            that are to be learned. (A classification is trained with one, too, though worse.)
            Also if a segmentation is to be learned by a model without outputs for each pixel.
    """
    if loss is not None:
        return Classification() if task is None else checked_task(model, task)
    task, activation = checked_task(model, task), output_activation(model)
    if task.name != Classification.name and activation in PROBABILITIES:
        raise ValueError(
            f"Received model '{model.name}', which ends in a {activation}, for the task "
            f"{task.name!r}; expected one without. Remove it, or open the model with "
            "open_base_model, which removes it."
        )
    if task.is_dense:
        task.check_model(model)
    return task


def record_trained_task(model: Any, task: Task) -> None:
    """Record the task of a training in the model, and so in its adapters.

    What was chosen for the former weights (thresholds, intervals) is not recorded.

    Warns:
        UserWarning: if it cannot be recorded, because the task has no labels.
    """
    if task.labels:
        record_task(model, dataclasses.replace(task.record(), chosen={}))
        return
    known = recorded_task(model)
    if task.name == Classification.name:
        if known is not None and known.name != task.name:
            record_task(model, None)
        return
    record_task(model, None)
    warnings.warn(
        f"Adapters of model '{model.name}' will not record its task, because {task} has no "
        "labels. Pass them, as in MultiLabel(('cat', 'dog')).",
        stacklevel=3,
    )
