"""``TaskRecord``: what a model was fine-tuned for, and what its outputs mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The activations that turn outputs into probabilities.
_ACTIVATIONS = ("softmax", "sigmoid", None)


@dataclass(frozen=True)
class TaskRecord:
    """What a model was fine-tuned for, as adapters and exported files record it.

    Args:
        name: The task: "classification", "multilabel", "regression" or "segmentation".
        labels: What each output stands for, in the order of the outputs.
        activation: What turns the outputs of the model into probabilities: "softmax",
            "sigmoid", or None if they are no logits.
        mean, std: For each output, the mean and standard deviation with which the targets were
            standardised: the prediction is mean + std * output. None if they were not.
        chosen: What was chosen on the validation pictures, by name: lists with a number for
            each output, or a number.
        masks: For a segmentation, what the classes are in masks: lists of "values" and
            "colours", one for each class, and of "ignored" values. None if not known.

    Raises:
        ValueError: if the values do not fit together.
    """

    name: str
    labels: tuple[str, ...]
    activation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(map(float, value)))
        lists = {k: v for k, v in self.chosen.items() if not isinstance(v, (int, float))}
        chosen = {**self.chosen, **{k: tuple(map(float, v)) for k, v in lists.items()}}
        object.__setattr__(self, "chosen", chosen)
        problem = self._problem()
        if problem:
            raise ValueError(f"Received a record of the task {self.name!r} with {problem}.")

    def _problem(self) -> str | None:
        if not isinstance(self.name, str) or not all(isinstance(x, str) for x in self.labels):
            return "names that are not text"
        if self.activation not in _ACTIVATIONS:
            return f"activation={self.activation!r}; expected one of {_ACTIVATIONS}"
        if (self.mean is None) != (self.std is None):
            return "only one of mean and std; expected both or none"
        lists = [("mean", self.mean), ("std", self.std), *self.chosen.items()]
        for name, value in lists:
            if value is None or isinstance(value, (int, float)):
                continue
            if len(value) != len(self.labels) or not all(map(math.isfinite, value)):
                return (
                    f"{name}={value!r} for {len(self.labels)} labels; expected a finite number "
                    "for each"
                )
        for name in ("values", "colours"):
            listed = (self.masks or {}).get(name)
            if listed is not None and len(listed) != len(self.labels):
                return f"{len(listed)} {name} of masks for {len(self.labels)} labels"
        if self.std is not None and min(self.std, default=1) <= 0:
            return f"std={self.std}; expected positive numbers"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain values for JSON and YAML."""
        values: dict[str, Any] = {"name": self.name, "labels": list(self.labels)}
        if self.activation is not None:
            values["activation"] = self.activation
        if self.mean is not None and self.std is not None:
            values.update(mean=list(self.mean), std=list(self.std))
        if self.masks is not None:
            values["masks"] = dict(self.masks)
        if self.chosen:
            values["chosen"] = {
                k: v if isinstance(v, (int, float)) else list(v) for k, v in self.chosen.items()
            }
        return values

    @classmethod
    def from_dict(cls, values: Any) -> TaskRecord:
        """Create a record from the result of ``to_dict``, which may come from anywhere.

        Raises:
            ValueError: if it is damaged.
        """
        known = ("name", "labels", "activation", "mean", "std", "chosen", "masks")
        try:
            return cls(**{name: values[name] for name in known if name in values})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"Received {values!r} as the record of a task: {error}") from error
