"""``ExportPlan``: the content of an exported file, independent of its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.exporting import pictures, writers
from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.exporting.description import file_metadata
from tfimm_lora.exporting.request import ExportRequest
from tfimm_lora.exporting.serving import Inputs, inputs_of, outputs_for, traced
from tfimm_lora.model.output_activation import with_activation
from tfimm_lora.model.state import recorded_task
from tfimm_lora.model.task_record import TaskRecord


@dataclass(frozen=True)
class ExportPlan:
    """The content of an exported file.

    Args:
        request: The path and format.
        inputs: The inputs of the model.
        file_inputs: The inputs of the file: those of the model, or pictures.
        prepare: The function from pictures to the input of the model, if the file includes the
            preprocessing; else None.
        preprocessing: The preprocessing as plain values, or None if it is unknown.
        labels: The names of the classes, or None.
        task: What the model was fine-tuned for, or None if it is not known.
    """

    request: ExportRequest
    inputs: Inputs
    file_inputs: Inputs
    prepare: Callable[[Any], Any] | None
    preprocessing: Mapping[str, Any] | None
    labels: Sequence[str] | None
    task: TaskRecord | None

    @classmethod
    def of(
        cls,
        model: Any,
        request: ExportRequest,
        labels: Sequence[str] | None,
        preprocessing: Any,
        include_preprocessing: bool,
        check_inputs: Any,
    ) -> ExportPlan:
        """Create the plan for a model from the arguments of ``export``."""
        values = pictures.preprocessing_values(preprocessing, model)
        inputs = inputs_of(model, check_inputs)
        labels = None if labels is None else [str(label) for label in labels]
        task = recorded_task(model)
        if not include_preprocessing:
            return cls(request, inputs, inputs, None, values, labels, task)
        file_inputs = pictures.picture_inputs(inputs, values)
        prepare = pictures.preprocessing_function(values or {})
        return cls(request, inputs, file_inputs, prepare, values, labels, task)

    def file_task(self) -> dict[str, Any] | None:
        """What the file is for, as plain values. Its numbers are not standardised."""
        if self.task is None:
            return None
        return replace(self.task, mean=None, std=None).to_dict()

    def arrays(self, check_inputs: Any, samples: np.ndarray | None) -> list[np.ndarray]:
        """The inputs of the file on which file and model are compared."""
        if check_inputs is not None:
            return pictures.given_arrays(check_inputs, self.file_inputs, "check_inputs")
        if samples is not None:
            return [samples]
        return pictures.seeded_arrays(self.file_inputs, self.preprocessing, n=3)

    def outputs_of(self, model: Any, arrays: list[np.ndarray]) -> Outputs:
        """The outputs of a model for inputs of the file.

        Raises:
            ValueError: if the model cannot be run on them.
        """
        if self.prepare is not None:
            arrays = [np.asarray(self.prepare(arrays[0]))]
        try:
            return outputs_for(model, self.inputs, arrays)
        except Exception as error:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(
                f"Model '{model.name}' cannot be run on test inputs of shape {shapes}: "
                f"{error}. Pass check_inputs= with inputs that it takes."
            ) from error

    def check_outputs(self, model: Any, outputs: Outputs) -> None:
        """Raise a ValueError unless the outputs are finite and fit the number of labels."""
        if not all(np.isfinite(y).all() for y in outputs.values()):
            raise ValueError(
                f"Model '{model.name}' has NaN or infinite outputs; expected finite ones to "
                "compare the file with. Check its weights, or pass other check_inputs."
            )
        shapes = [y.shape for y in outputs.values()]
        if self.labels is not None and [s[-1:] for s in shapes] != [(len(self.labels),)]:
            raise ValueError(
                f"Received {len(self.labels)} labels for a model with outputs of shape "
                f"{', '.join(str((None, *s[1:])) for s in shapes)}; expected one label for "
                "each class."
            )

    def write(
        self,
        plain: Any,
        path: Path,
        samples: np.ndarray | None,
        *,
        returns: str | None,
        activation: str | None,
    ) -> tuple[str, ...]:
        """Write an ordinary float32 model.

        Args:
            plain: The model. For a Keras file, its layers may change.
            path: The file.
            samples: The samples for quantization, or None.
            returns: What the outputs of the file are.
            activation: The activation to add to the model: "softmax", "sigmoid" or None.

        Returns:
            The packages that are needed to load the file.
        """
        request = self.request
        if request.format == "keras":
            if activation is not None:
                symbolic = lambda: writers.symbolic_inputs(plain, self.inputs)  # noqa: E731
                plain = with_activation(plain, activation, symbolic)
            return writers.write_keras(plain, self.inputs, path)
        import tensorflow as tf

        function = traced(
            plain,
            self.inputs,
            self.file_inputs,
            self.prepare,
            finish=None if activation is None else getattr(tf.nn, activation),
            inline=request.format != "savedmodel",
        )
        metadata = file_metadata(
            self.labels, self.preprocessing, self.prepare is not None, returns, self.file_task()
        )
        if request.format == "savedmodel":
            writers.write_savedmodel(function, path, metadata)
        elif request.format == "tflite":
            writers.write_tflite(function, path, request.quantize, samples, metadata)
        else:
            writers.write_onnx(function, path, request.opset, metadata)
        return ()
