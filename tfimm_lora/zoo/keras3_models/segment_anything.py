"""keras_hub's Segment Anything without prompts: scores of classes for each pixel."""

from __future__ import annotations

import functools
from typing import Any

from tfimm_lora.backend import backend_of, default_backend
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.utils.optional_imports import require

#: The parts of the mask decoder that are kept. Its mask tokens, and the layers that turn them
#: into masks, are new.
_KEPT = ("transformer", "output_upscaling", "iou_token")


def is_segment_anything(model: Any) -> bool:
    """Whether a model is Segment Anything of keras_hub."""
    names = {
        f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(model).__mro__
    }
    return not names.isdisjoint(("keras_hub.SAMImageSegmenter", "keras_hub.SAMBackbone"))


def encoder_of(model: Any) -> Any:
    """The image encoder of Segment Anything."""
    return getattr(model, "backbone", model).image_encoder


def anything_segmenter(model: Any, classes: int) -> Any:
    """Create a model for segmentation from Segment Anything.

    As ``zoo.segment_anything_classes.anything_segmenter``, for keras_hub. The layers of the
    image encoder are reused.

    Args:
        model: A ``SAMImageSegmenter`` or ``SAMBackbone``.
        classes: The number of classes.

    Returns:
        A functional model that returns logits (batch, height, width, classes).
    """
    backend = backend_of(model)
    backbone = getattr(model, "backbone", model)
    encoder, given = encoder_of(model), backbone.mask_decoder
    size = tuple(encoder.input.shape[1:3])
    config = {**given.get_config(), "num_multimask_outputs": classes - 1}
    for name in ("name", "dtype"):
        config.pop(name, None)
    decoder = _pixel_decoder()(size, **config, name=DECODER, dtype=given.dtype_policy)
    # Not the layers of the encoder alone: Keras could not create them again.
    inputs = backend.keras.Input(encoder.input.shape[1:], name="images")
    outputs = decoder(encoder(inputs))
    for part in _KEPT:
        _copy(getattr(given, part), getattr(decoder, part))
    prompts = backbone.prompt_encoder
    _copy(prompts.positional_embedding_layer, decoder.positions)
    _copy(prompts.no_mask_embed, decoder.no_mask_embed)
    result = backend.keras.Model(inputs, outputs, name=model.name)
    result.backbone = encoder  # its class tells whose names its layers have
    return result


def _copy(source: Any, target: Any) -> None:
    target.set_weights(source.get_weights())


@functools.cache
def _pixel_decoder() -> Any:
    """The class of the decoder. keras_hub is imported when it is first needed."""
    hub = require("keras_hub", extra="hub", why="Segment Anything")
    layers_of_sam = require(
        "keras_hub.src.models.sam.sam_layers", extra="hub", why="Segment Anything"
    )
    keras = default_backend().keras
    ops = keras.ops

    @keras.saving.register_keras_serializable("tfimm_lora")
    class PixelDecoder(hub.layers.SAMMaskDecoder):  # type: ignore[misc, name-defined]
        """The mask decoder without prompts, with one mask token for each class.

        The positions of the features and the embedding for "no mask", which the prompt encoder
        has, are part of it. It has no head for the quality of a mask.
        """

        def __init__(self, size: tuple[int, int], **kwargs: Any) -> None:
            super().__init__(**kwargs)
            del self.iou_prediction_head
            self.iou_prediction_head: Any = _Nothing()
            self.size = tuple(size)
            self.positions = layers_of_sam.RandomFrequencyPositionalEmbeddings(
                self.embedding_dim // 2, 1, dtype=self.dtype_policy
            )
            self.no_mask_embed = keras.layers.Embedding(
                1, self.embedding_dim, name="no_mask_embed", dtype=self.dtype_policy
            )

        def build(self, input_shape: Any) -> None:
            super().build()
            self.positions.build()
            self.no_mask_embed.build([None])

        def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
            return (input_shape[0], *self.size, self.num_mask_tokens)

        def call(self, features: Any) -> Any:
            shape = ops.shape(features)
            rows, columns = features.shape[1:3]
            positions = self.positions.encode_image((rows, columns))
            masks, _ = self._predict_masks(
                image_embeddings=features,
                image_positional_embeddings=positions[None],
                prompt_sparse_embeddings=ops.zeros(
                    (shape[0], 0, self.embedding_dim), self.compute_dtype
                ),
                prompt_dense_embeddings=self.no_mask_embed(ops.zeros((1, 1, 1), "int32")),
            )
            masks = ops.transpose(masks, (0, 2, 3, 1))
            return ops.image.resize(masks, self.size, "bilinear", data_format="channels_last")

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "size": self.size}

    return PixelDecoder


class _Nothing:
    """Stands for the head that is left out."""

    def build(self, input_shape: Any) -> None:
        """Has no variables."""

    def __call__(self, token: Any) -> Any:
        return token
