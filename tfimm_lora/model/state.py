"""The state of a model that LoRA was injected into, in one object.

It is kept in ``model.__dict__["_lora_model"]``, where Keras neither tracks nor wraps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tfimm_lora.backend.interface import Layer, Variable
from tfimm_lora.config import LoRAConfig
from tfimm_lora.model.task_record import TaskRecord

_STATE = "_lora_model"
_BASE_NAME = "_lora_base_name"
_TIMM_NAMES = "_lora_timm_names"
_CLASS_NAMES = "_lora_class_names"
_TASK = "_lora_task"
#: The end of the name of a base model with random weights.
RANDOM = " (random weights)"


class ReplacedWeight(NamedTuple):
    """A weight that an adapter replaced: its variable, and its value before any adapter."""

    variable: Variable
    before: Any


@dataclass
class ModelState:
    """The recorded state of a model."""

    #: The settings with which LoRA was injected; None if layers were adapted by hand.
    config: LoRAConfig | None = None
    #: The weights that an adapter replaced, by their key in adapters.
    replaced: dict[str, ReplacedWeight] = field(default_factory=dict)
    #: The values of such weights while the adapter is disabled, by key; else empty.
    while_disabled: dict[str, Any] = field(default_factory=dict)
    #: The digests of statistics when LoRA was injected; see ``changed_statistics``.
    statistics: dict[int, bytes] = field(default_factory=dict)


def model_state(model: Layer) -> ModelState:
    """Return the state of a model, and create it if there is none."""
    state: ModelState = model.__dict__.setdefault(_STATE, ModelState())
    return state


def drop_model_state(model: Layer) -> None:
    """Remove the state of a model or layer, if it has one."""
    model.__dict__.pop(_STATE, None)


def config_of(model: Layer) -> LoRAConfig | None:
    """Return the settings with which LoRA was injected into a model, or None."""
    state: ModelState | None = model.__dict__.get(_STATE)
    return state.config if state is not None else None


def record_base_name(model: Layer, name: str) -> None:
    """Record the origin of a model's weights, under which its adapters name it."""
    model.__dict__[_BASE_NAME] = name


def base_name(model: Layer) -> str | None:
    """Return the recorded origin of a model's weights; None if it is not known."""
    name: str | None = model.__dict__.get(_BASE_NAME)
    return name


def copy_base_name(source: Layer, target: Layer) -> None:
    """Record the origin of a model's weights for a model that has a copy of them."""
    name = base_name(source)
    if name is not None:
        record_base_name(target, name)
    copy_description(source, target)


def copy_description(source: Layer, target: Layer) -> None:
    """Record for a copy what describes a model, but not the origin of its weights.

    It is the config with the preprocessing, which a functional model does not recreate, the
    names of the classes, what it was fine-tuned for, and that its adapters have timm's names.
    """
    if hasattr(source, "cfg") and not hasattr(target, "cfg"):
        target.cfg = source.cfg
    record_class_names(target, recorded_class_names(source))
    record_task(target, recorded_task(source))
    if saves_timm_names(source):
        record_timm_names(target)


def record_class_names(model: Layer, names: Sequence[str] | None) -> None:
    """Record the names of the classes of a model's weights, or that they are not known."""
    model.__dict__.pop(_CLASS_NAMES, None)
    if names is not None:
        model.__dict__[_CLASS_NAMES] = tuple(names)


def recorded_class_names(model: Layer) -> tuple[str, ...] | None:
    """Return the recorded names of the classes; None if they are not known."""
    names: tuple[str, ...] | None = model.__dict__.get(_CLASS_NAMES)
    return names


def record_task(model: Layer, task: TaskRecord | None) -> None:
    """Record what a model was fine-tuned for, or that it is not known."""
    model.__dict__.pop(_TASK, None)
    if task is not None:
        model.__dict__[_TASK] = task


def recorded_task(model: Layer) -> TaskRecord | None:
    """Return what a model was fine-tuned for; None if it is not known."""
    task: TaskRecord | None = model.__dict__.get(_TASK)
    return task


def record_timm_names(model: Layer) -> None:
    """Record that the adapters of a Keras 3 model are saved with timm's names."""
    model.__dict__[_TIMM_NAMES] = True


def saves_timm_names(model: Layer) -> bool:
    """Whether the adapters of a model of another library are saved with timm's names."""
    return bool(model.__dict__.get(_TIMM_NAMES, False))


def random_weights(name: str) -> str:
    """Return the name of a base model with random weights; no checkpoint has this name.

    Example:
        >>> from tfimm_lora.model.state import random_weights
        >>> random_weights("convnext_tiny")
        'convnext_tiny (random weights)'
    """
    return name if name.endswith(RANDOM) else name + RANDOM


def has_random_weights(name: str) -> bool:
    """Whether the name of a base model is one of ``random_weights``."""
    return name.endswith(RANDOM)


def restore_replaced_weights(model: Layer) -> None:
    """Assign the values that weights had before an adapter replaced them."""
    state = model_state(model)
    for weight in state.replaced.values():
        weight.variable.assign(weight.before)
    state.replaced = {}
