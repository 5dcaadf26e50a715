"""All tasks by name."""

from __future__ import annotations

from collections.abc import Sequence

from tfimm_lora.finetuning.data.targets import Targets
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


def targets_of(
    name: str, columns: Sequence[str] | None, masks: str | None, classes: str | None
) -> Targets:
    """What the pictures of a task are labelled with.

    Args:
        name: The task.
        columns: The columns of a CSV file; see ``Task.targets``.
        masks, classes: The folder of the masks and the table of the classes of a segmentation.

    Raises:
        ValueError: for another name, and for arguments that the task does not have.
    """
    task = task_named(name)
    given = {"masks": masks, "classes": classes}
    given = {key: value for key, value in given.items() if value is not None}
    if given and not task.is_dense:
        (key, value), *_ = given.items()
        raise ValueError(
            f"Received {key}={value!r} with the task {name!r}; expected None, or the task "
            "'segmentation'."
        )
    return task.targets(columns, **given)


def task_of_record(record: TaskRecord) -> Task:
    """The task that a record describes."""
    return task_named(record.name).of_record(record)
