"""tfimm models for segmentation: their features, and a decoder instead of the classifier."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tfimm_lora.backend import legacy_backend
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.naming import is_tfimm
from tfimm_lora.model.new_decoder import create_decoder, features_of, fixed_size, no_features
from tfimm_lora.model.state import copy_base_name
from tfimm_lora.model.transfer import transfer_weights

#: The package under which the classes are registered with Keras.
_PACKAGE = "tfimm_lora"


class Segmenter:
    """Mixin for a tfimm model that returns logits (batch, height, width, classes).

    It has no classifier, but the decoder of ``with_decoder``. ``cfg.nb_classes`` is the number
    of classes of the decoder.
    """

    cfg: Any
    dummy_inputs: Any
    pixel_head: Any

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        plain = dataclasses.replace(cfg, nb_classes=0)
        super().__init__(plain, *args, **kwargs)  # type: ignore[call-arg]
        self.cfg = dataclasses.replace(cfg, classifier=DECODER)
        self.pixel_head = None
        self(self.dummy_inputs)  # type: ignore[operator]

    def call(self, x: Any, training: bool = False) -> Any:
        """Compute the logits. The first call creates the decoder."""
        _, features = super().call(  # type: ignore[misc]
            x, training=training, return_features=True
        )
        size = fixed_size(self, self.cfg.input_size)
        maps = features_of(features, size)
        if maps is None:
            raise no_features(self, "tfimm's features of it are no maps")
        if self.pixel_head is None:
            shapes = [tuple(x.shape)[1:] for x in maps]
            keras = legacy_backend().keras
            self.pixel_head = create_decoder(keras, shapes, self.cfg.nb_classes, size)
        return self.pixel_head(maps if len(maps) > 1 else maps[0], training=training)


@functools.cache
def segmentation_class(base: type) -> type:
    """The class of a tfimm architecture for segmentation, registered with Keras."""
    name = f"Segmentation{base.__name__}"
    cls = type(name, (Segmenter, base), {"__module__": __name__, "plain_class": base})
    return legacy_backend().keras.utils.register_keras_serializable(_PACKAGE)(cls)  # type: ignore[no-any-return]


def tfimm_segmenter(model: Any, classes: int) -> Any:
    """Create a tfimm model for segmentation with the weights of a classifier.

    Segment Anything keeps its own decoder; see ``anything_segmenter``.

    Args:
        model: A built model of tfimm.
        classes: The number of classes.

    Raises:
        ValueError: If it has no feature maps.
    """
    if _is_segment_anything(model):
        from tfimm_lora.zoo.segment_anything_classes import anything_segmenter

        return anything_segmenter(model, classes)
    cfg = dataclasses.replace(model.cfg, nb_classes=classes)
    base: Any = type(model)
    result: Any = segmentation_class(base)(cfg)
    heads = [f"^{path}/" for path in classifier_paths(model)]
    transfer_weights(model, result, [f"^{DECODER}/", *heads])
    copy_base_name(model, result)
    return result


def _is_segment_anything(model: Any) -> bool:
    names = {cls.__name__ for cls in type(model).__mro__}
    return is_tfimm(model) and "SegmentAnythingModel" in names


def without_segmenter(model: Any) -> Any:
    """Create a functional model of tfimm's class and the decoder, which loads without us.

    A model of another class is returned as it is.

    Raises:
        ValueError: For Segment Anything, whose decoder is a class of this package.
    """
    base = getattr(type(model), "plain_class", None)
    if base is None:
        return model
    if _is_segment_anything(model):
        raise ValueError(
            f"Received model '{model.name}', whose decoder without prompts is a class of "
            "tfimm_lora that Keras cannot load without it; expected another format than "
            ".keras, such as SavedModel or ONNX."
        )
    cfg, keras = model.cfg, legacy_backend().keras
    plain = base(dataclasses.replace(cfg, nb_classes=0))
    plain(plain.dummy_inputs)
    transfer_weights(model, plain)
    # The Transformers of tfimm need a known batch size to be built. The model takes any.
    inputs = keras.Input((*cfg.input_size, cfg.in_channels), batch_size=1)
    _, features = plain(inputs, return_features=True)
    maps = features_of(features, cfg.input_size)
    assert maps is not None
    outputs = model.pixel_head(maps if len(maps) > 1 else maps[0])
    return keras.Model(inputs, outputs, name=model.name)
