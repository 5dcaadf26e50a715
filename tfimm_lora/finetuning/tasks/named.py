"""All tasks by name."""

from __future__ import annotations

from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.finetuning.tasks.multilabel import MultiLabel
from tfimm_lora.finetuning.tasks.regression import Regression
from tfimm_lora.finetuning.tasks.segmentation import Segmentation
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.validation import check_choice

#: The only list of tasks.
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, MultiLabel, Regression, Segmentation)
}

#: The task of a recipe that names none.
DEFAULT = Classification.name


def task_named(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: for another name.

    Example:
        >>> from tfimm_lora.finetuning.tasks.named import task_named
        >>> task_named("classification").activation
        'softmax'
    """
    check_choice(name, "task", tuple(TASKS))
    return TASKS[name]


def task_of_record(record: TaskRecord) -> Task:
    """The task that a record describes."""
    return task_named(record.name).of_record(record)
