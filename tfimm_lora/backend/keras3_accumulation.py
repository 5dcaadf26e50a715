"""Gradient accumulation for optimizers of Keras 3."""

from __future__ import annotations

from typing import Any

import keras


def accumulate_gradients(optimizer: Any, steps: int) -> None:
    """See ``Backend.accumulate_gradients``."""
    before = optimizer.gradient_accumulation_steps
    if optimizer.built or before:
        raise ValueError(
            f"Received accumulate={steps} with an optimizer that "
            + (f"has gradient_accumulation_steps={before}" if before else "is built")
            + "; expected a new one without."
        )
    optimizer.gradient_accumulation_steps = steps
    if isinstance(optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        optimizer.learning_rate = UpdateSchedule(optimizer._learning_rate, steps)


@keras.saving.register_keras_serializable("tfimm_lora")
class UpdateSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule in updates. Keras calls schedules with the number of accumulated steps."""

    def __init__(self, schedule: Any, steps: int) -> None:
        self.schedule, self.steps = schedule, steps

    def __call__(self, step: Any) -> Any:
        return self.schedule(keras.ops.floor_divide(step, self.steps))

    def get_config(self) -> dict[str, Any]:
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> UpdateSchedule:
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["steps"])
