"""Access to keras_hub and the builders of ``keras.applications``; changes of their models."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from tfimm_lora.utils.optional_imports import require

Shape = tuple[int, int, int]


def keras_hub_models(name: str) -> Any:
    """The module ``keras_hub.models``.

    Raises:
        ImportError: If keras_hub is not installed.
    """
    return require("keras_hub", extra="hub", why=f"The model {name} on Keras 3").models


def applications_module(keras: Any, function: str) -> Any:
    """The module of ``keras.applications`` that defines a function.

    Its general builders, such as ``EfficientNet(width_coefficient, ...)``, are not public.
    """
    return sys.modules[inspect.unwrap(getattr(keras.applications, function)).__module__]


def with_classifier(keras: Any, inputs: Any, features: Any, classes: int) -> Any:
    """A model from inputs to features, or to the logits of the classifier "predictions"."""
    if not classes:
        return keras.Model(inputs, features)
    return keras.Model(inputs, keras.layers.Dense(classes, name="predictions")(features))


def set_epsilon(keras: Any, model: Any, epsilon: float) -> None:
    """Set the epsilon of every normalization layer."""
    kinds = (keras.layers.BatchNormalization, keras.layers.LayerNormalization)
    for layer in model._flatten_layers():
        if isinstance(layer, kinds):
            layer.epsilon = epsilon


def without_preprocessing(keras: Any, model: Any, first: str) -> Any:
    """The part of a model after its preprocessing.

    Args:
        keras: The module keras.
        model: A functional model.
        first: The name of the first layer to keep.
    """
    return keras.Model(model.get_layer(first).input, model.output, name=model.name)


def with_torch_padding(keras: Any, model: Any) -> Any:
    """A copy of a model whose strided layers pad both sides by half the kernel, as in torch.

    "same" pads by one pixel less on the left and top where the size is even. Layers of
    stride 1 are the same in both.

    Args:
        keras: The module keras.
        model: A functional model of layers that take one tensor of images.
    """
    layers = keras.layers
    sizes = {layer.output.name: kernel for layer, kernel in _padded_kernels(layers, model)}

    def copied(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, layers.ZeroPadding2D) and layer.output.name in sizes:
            side = sizes[layer.output.name] // 2
            config["padding"] = ((side, side), (side, side))
        elif _strides(layer) and layer.padding == "same":
            config["padding"] = "valid"
        return layer.__class__.from_config(config)

    def called(layer: Any, *args: Any, **kwargs: Any) -> Any:
        original = model.get_layer(layer.name)
        if _strides(original) and original.padding == "same":
            side = original.kernel_size[0] // 2
            padded = layers.ZeroPadding2D(side, name=f"{layer.name}_pad")(*args)
            return layer(padded, **kwargs)
        return layer(*args, **kwargs)

    return keras.models.clone_model(model, clone_function=copied, call_function=called)


def _padded_kernels(layers: Any, model: Any) -> Iterator[tuple[Any, int]]:
    """The padding layers of a model, and the kernel size of the convolution after each."""
    convolutions = {
        layer.input.name: layer.kernel_size[0]
        for layer in model.layers
        if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D))
    }
    for layer in model.layers:
        if isinstance(layer, layers.ZeroPadding2D):
            yield layer, convolutions[layer.output.name]


def _strides(layer: Any) -> bool:
    """Whether a layer is a convolution with a stride of more than 1."""
    return hasattr(layer, "kernel_size") and max(layer.strides) > 1
