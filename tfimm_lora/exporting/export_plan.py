"""``Plan``: what a file is to take, give and tell, for any format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.exporting import pictures, writers
from tfimm_lora.exporting.comparison import Outputs
from tfimm_lora.exporting.description import properties
from tfimm_lora.exporting.request import Request
from tfimm_lora.exporting.serving import Inputs, inputs_of, outputs_for, traced


@dataclass(frozen=True)
class Plan:
    """What a file is to hold.

    Args:
        request: Where, in which format.
        inputs: What the model takes.
        takes: What the file takes: the same, or pictures.
        prepare: From pictures to the model's input, where the file does that.
        preprocessing: The same as plain values, or None if it is unknown.
        labels: Names of the classes, or None.
    """

    request: Request
    inputs: Inputs
    takes: Inputs
    prepare: Callable[[Any], Any] | None
    preprocessing: Mapping[str, Any] | None
    labels: Sequence[str] | None

    @classmethod
    def of(
        cls,
        model: Any,
        request: Request,
        labels: Sequence[str] | None,
        preprocessing: Any,
        include_preprocessing: bool,
        check_inputs: Any,
    ) -> Plan:
        """The plan for a model, from arguments of ``export``."""
        values = pictures.preprocessing_values(preprocessing, model)
        inputs = inputs_of(model, check_inputs)
        labels = None if labels is None else [str(label) for label in labels]
        if not include_preprocessing:
            return cls(request, inputs, inputs, None, values, labels)
        takes = pictures.pictures_in_place_of(inputs, values)
        prepare = pictures.preprocessing_function(values or {})
        return cls(request, inputs, takes, prepare, values, labels)

    def arrays(self, check_inputs: Any, samples: np.ndarray | None) -> list[np.ndarray]:
        """What the file and the model are run on."""
        if check_inputs is not None:
            return pictures.given_arrays(check_inputs, self.takes, "check_inputs")
        if samples is not None:
            return [samples]
        return pictures.seeded_arrays(self.takes, self.preprocessing, n=3)

    def outputs_of(self, model: Any, arrays: list[np.ndarray]) -> Outputs:
        """What a model gives for what the file takes.

        Raises:
            ValueError: if it cannot be run on them.
        """
        if self.prepare is not None:
            arrays = [self.prepare(arrays[0]).numpy()]
        try:
            return outputs_for(model, self.inputs, arrays)
        except Exception as error:
            shapes = ", ".join(str(array.shape) for array in arrays)
            raise ValueError(
                f"Model '{model.name}' cannot be run on inputs of shape {shapes}, to compare a "
                f"file with: {error}. If it takes others, pass check_inputs= with some."
            ) from error

    def check_outputs(self, model: Any, outputs: Outputs) -> None:
        """Raise a ValueError unless outputs are finite and as many as there are labels."""
        if not all(np.isfinite(y).all() for y in outputs.values()):
            raise ValueError(
                f"Model '{model.name}' gives numbers that are not finite, so there is nothing "
                "to compare a file with. Check its weights, or pass other check_inputs."
            )
        shapes = [y.shape for y in outputs.values()]
        if self.labels is not None and [s[1:] for s in shapes] != [(len(self.labels),)]:
            raise ValueError(
                f"Received {len(self.labels)} labels for a model that gives "
                f"{', '.join(str((None, *s[1:])) for s in shapes)}; expected a label for each "
                "of its classes."
            )

    def write(self, plain: Any, path: Path, samples: np.ndarray | None) -> tuple[str, ...]:
        """Write an ordinary model in float32, and give the packages that loading it takes."""
        request = self.request
        if request.format == "keras":
            return writers.write_keras(plain, self.inputs, path)
        by_converter = request.format != "savedmodel"
        function = traced(plain, self.inputs, self.takes, self.prepare, inline=by_converter)
        if request.format == "savedmodel":
            writers.write_savedmodel(function, path)
        elif request.format == "tflite":
            writers.write_tflite(function, path, request.quantize, samples)
        else:
            told = properties(self.labels, self.preprocessing, self.prepare is not None)
            writers.write_onnx(function, path, request.opset, told)
        return ()
