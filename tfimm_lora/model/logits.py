"""Make a functional model return logits for a number of classes."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend.interface import Backend
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.new_classifier import takes_pictures, with_classifier
from tfimm_lora.model.output_activation import PROBABILITIES, activation_name


def with_logits(backend: Backend, model: Any, classes: int | None) -> tuple[Any, bool]:
    """Remove the softmax or sigmoid at the end of a model and set its number of classes.

    The classifier is a dense layer, or a 1x1 convolution whose output is flattened. It may be
    inside models that are inside ``model``. The softmax may be its activation, or a layer of
    any of these models. A backbone that has no classifier gets one.

    Args:
        backend: The backend of the model.
        model: A functional or Sequential model. Its layers are reused, and may change.
        classes: The number of classes. Default: that of the model.

    Returns:
        The model, and whether its classifier is new.

    Raises:
        ValueError: if there is no classifier that can be replaced.
    """
    layers = dict(backend.walk(model))
    heads = classifier_paths(model)
    if not heads and classes is not None and takes_pictures(model):
        return with_classifier(model, classes), True
    head: Any = layers[heads[0]] if len(heads) == 1 else None
    keras = backend.keras
    if not isinstance(head, (keras.layers.Dense, keras.layers.Conv2D)):
        raise _no_classifier(model, heads)
    is_new = classes not in (None, _units(head))
    if not (backend.is_functional(model) or isinstance(model, keras.Sequential)):
        if not is_new and activation_name(head) == "linear" and model.layers[-1] is head:
            return model, False
        raise _no_classifier(model, heads)
    if not is_new:
        classes = None
    rebuilt = _Rebuilt(backend, head, classes)
    result = rebuilt.model(model)
    if not rebuilt.found:
        raise _no_classifier(model, heads)
    return result, is_new


class _Rebuilt:
    """A model with another classifier. Layers before the classifier are the same objects."""

    def __init__(self, backend: Backend, head: Any, classes: int | None) -> None:
        self.backend, self.head, self.classes = backend, head, classes
        self.layers = backend.keras.layers
        self.found = False

    def model(self, model: Any) -> Any:
        """The model itself if its graph does not change, or a functional model."""
        output = model.outputs[0]
        new = self.tensor(output)
        if new is output:
            return model
        # A list of one input would make Keras warn of each call with an array.
        inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
        return self.backend.keras.Model(inputs, new, name=model.name)

    def tensor(self, tensor: Any) -> Any:
        """The symbolic tensor that takes the place of ``tensor``."""
        layer, inputs = self.backend.made_by(tensor)
        if layer is self.head:
            self.found = True
            return self._classified(layer, inputs, tensor)
        if self.backend.is_model(layer) and self._contains_head(layer):
            inner = self.model(layer)
            return tensor if inner is layer else inner(inputs[0])
        if len(inputs) != 1:
            return tensor
        before = self.tensor(inputs[0])
        if self.found and self._is_removed(layer):
            return before
        if before is inputs[0]:
            return tensor
        if self.classes is not None and isinstance(layer, self.layers.Reshape):
            return self.layers.Flatten(name=layer.name)(before)
        return layer(before)

    def _classified(self, head: Any, inputs: list[Any], tensor: Any) -> Any:
        _check_activation(head)
        if self.classes is None:
            head.activation = self.backend.keras.activations.linear
            return tensor
        config = {"name": head.name, "use_bias": head.use_bias}
        if isinstance(head, self.layers.Dense):
            return self.layers.Dense(self.classes, **config)(inputs[0])
        return self.layers.Conv2D(self.classes, 1, **config)(inputs[0])

    def _contains_head(self, model: Any) -> bool:
        return any(layer is self.head for _, layer in self.backend.walk(model))

    def _is_removed(self, layer: Any) -> bool:
        """Whether a layer after the classifier is the activation to remove."""
        if not isinstance(layer, (self.layers.Softmax, self.layers.Activation)):
            return False
        _check_activation(layer)
        return activation_name(layer) in PROBABILITIES


def _check_activation(layer: Any) -> None:
    """Raise a ValueError for an activation without which the model would be another one."""
    name = activation_name(layer)
    if name not in ("linear", *PROBABILITIES):
        raise ValueError(
            f"The model ends in layer '{layer.name}' with the activation {name}; expected a "
            "classifier that returns logits, or one that ends in "
            f"{' or '.join(PROBABILITIES)}, which is removed for training."
        )


def _units(head: Any) -> int:
    count: int = head.units if hasattr(head, "units") else head.filters
    return count


def _no_classifier(model: Any, heads: list[str]) -> ValueError:
    return ValueError(
        f"The model '{model.name}' ({type(model).__name__}) has no classifier that can be "
        "replaced; expected a functional or Sequential model with one classifier at its end: a "
        "Dense layer, or a 1x1 convolution that is flattened. Its last layers: "
        f"{', '.join(heads) or 'none'}."
    )
