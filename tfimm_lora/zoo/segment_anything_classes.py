"""tfimm's Segment Anything without prompts: scores of classes for each pixel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tfimm.architectures.segment_anything import (
    SegmentAnythingModel,
    SegmentAnythingModelConfig,
)
from tfimm.architectures.segment_anything.mask_decoder import MaskDecoder
from tfimm.architectures.segment_anything.prompt_encoder import PositionalEmbeddingRandom
from tfimm.architectures.segment_anything.transformer import TwoWayTransformer

from tfimm_lora.backend import legacy_backend
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.model.state import copy_base_name
from tfimm_lora.model.transfer import transfer_weights

_register = legacy_backend().keras.utils.register_keras_serializable("tfimm_lora")


@dataclass
class SegmentationSegmentAnythingConfig(SegmentAnythingModelConfig):  # type: ignore[misc]
    """``SegmentAnythingModelConfig`` with the number of classes."""

    nb_classes: int = 2
    classifier: str = DECODER


class PixelDecoder(MaskDecoder):  # type: ignore[misc]
    """The mask decoder without prompts, with one mask token for each class.

    The positions of the features and the embedding for "no mask", which the prompt encoder has,
    are part of it. It has no head for the quality of a mask.
    """

    def __init__(self, cfg: SegmentationSegmentAnythingConfig, **kwargs: Any) -> None:
        super().__init__(
            transformer=TwoWayTransformer(
                embed_dim=cfg.embed_dim,
                nb_blocks=cfg.decoder_nb_blocks,
                nb_heads=cfg.decoder_nb_heads,
                mlp_dim=cfg.decoder_mlp_channels,
                attention_downsample_rate=2,
                act_layer="relu",
                name="transformer",
            ),
            embed_dim=cfg.embed_dim,
            nb_multimask_outputs=cfg.nb_classes - 1,
            iou_head_depth=cfg.decoder_iou_head_depth,
            iou_head_hidden_dim=cfg.decoder_iou_hidden_dim,
            act_layer="gelu",
            **kwargs,
        )
        self.size = cfg.input_size
        self.patch = cfg.encoder_patch_size
        self.pe_layer = PositionalEmbeddingRandom(cfg.embed_dim, name="pe_layer")
        self.iou_prediction_head = _nothing
        self.no_mask_embed: Any = None

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.no_mask_embed = self.add_weight(
            shape=(1, self.embed_dim), initializer="zeros", name="no_mask_embed/weight"
        )

    def call(self, features: Any, training: bool = False) -> Any:
        """Compute logits (n, h, w, classes) from the features of the image encoder."""
        rows, columns = (side // self.patch for side in self.size)
        positions = self.pe_layer.embed_grid((rows, columns))[tf.newaxis]
        masks, _ = self.predict_masks(
            image_embeddings=features,
            image_pe=tf.broadcast_to(positions, tf.shape(features)),
            sparse_embeddings=tf.zeros((tf.shape(features)[0], 0, self.embed_dim)),
            dense_embeddings=tf.reshape(self.no_mask_embed, (1, 1, 1, self.embed_dim)),
            training=training,
        )
        masks = tf.ensure_shape(masks, (None, self.nb_mask_tokens, 4 * rows, 4 * columns))
        return tf.image.resize(tf.transpose(masks, (0, 2, 3, 1)), self.size)


def _nothing(token: Any) -> Any:
    return token


@_register
class SegmentationSegmentAnythingModel(SegmentAnythingModel):  # type: ignore[misc]
    """Segment Anything that returns logits (batch, height, width, classes) for pictures."""

    plain_class = SegmentAnythingModel

    def __init__(self, cfg: SegmentationSegmentAnythingConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        del self.prompt_encoder, self.mask_decoder
        self.pixel_head = PixelDecoder(cfg, name=DECODER)
        self(self.dummy_inputs)

    @property
    def dummy_inputs(self) -> Any:
        return tf.zeros((1, *self.cfg.input_size, self.cfg.in_channels))

    def call(self, x: Any, training: bool = False) -> Any:
        """Compute the logits."""
        features = self.image_encoder(x, training=training)
        return self.pixel_head(features, training=training)

    @classmethod
    def from_config(cls, config: Any) -> Any:
        return cls(SegmentationSegmentAnythingConfig(**config))


def anything_segmenter(model: Any, classes: int) -> Any:
    """Create a model for segmentation with the weights of Segment Anything.

    The mask tokens and the layers that turn them into masks are new; there is one of each for
    each class. The decoder has all else of the mask decoder, the positions and the embedding
    for "no mask". No prompts are used.

    Args:
        model: A built ``SegmentAnythingModel``.
        classes: The number of classes.

    References: Zhang and Liu, "Customized Segment Anything Model for Medical Image
    Segmentation", arXiv:2304.13785.
    """
    cfg = SegmentationSegmentAnythingConfig(
        **{**dataclasses.asdict(model.cfg), "nb_classes": classes}
    )
    result = SegmentationSegmentAnythingModel(cfg)
    transfer_weights(model, result, [f"^{DECODER}/"])
    decoder, given = result.pixel_head, model.mask_decoder
    for part in ("transformer", "output_upscaling"):
        transfer_weights(getattr(given, part), getattr(decoder, part))
    decoder.iou_token.assign(given.iou_token)
    prompts = model.prompt_encoder
    decoder.no_mask_embed.assign(prompts.no_mask_embed)
    decoder.pe_layer.positional_encoding_gaussian_matrix.assign(
        prompts.pe_layer.positional_encoding_gaussian_matrix
    )
    copy_base_name(model, result)
    return result
