"""A tiny model of every tfimm family, and of each of its kinds that differ in layers."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tfimm
import tfimm.architectures.segment_anything

from tests.helpers.kerases import normal

_TRANSFORMER = dict(patch_size=8, embed_dim=8, nb_blocks=2, nb_heads=2)
_MIXER = dict(input_size=(16, 16), patch_size=4, embed_dim=8, nb_blocks=2)
_RESNET = dict(input_size=(32, 32), nb_blocks=(1, 1, 1, 1), nb_channels=(4, 4, 8, 8))
_STAGES = dict(nb_blocks=(1, 1), nb_heads=(1, 2))


@dataclass
class Tiny:
    """A small variant of a model that tfimm has."""

    name: str
    """The tfimm name of which it is a variant."""
    changes: dict[str, Any]
    """Fields of its config with other values."""
    leaves: str
    """The last names of the layers that LoRA adapts by default."""
    count: int
    """How many layers that is."""
    larger: tuple[int, int] = field(default=(64, 64))
    """Another input size that the architecture can be converted to."""

    def config(self, **changes):
        cfg = tfimm.models.model_config(self.name)
        classes = {"nb_classes": 3} if hasattr(cfg, "nb_classes") else {}
        return dataclasses.replace(cfg, **{**classes, **self.changes, **changes})

    def make(self, **changes):
        """A built model with no weight left at an initial value that hides others."""
        model = tfimm.models.model_class(self.name)(self.config(**changes))
        model(model.dummy_inputs)
        for seed, weight in enumerate(model.weights):
            if _hides(weight):
                value = 0.3 * normal(*weight.shape, seed=seed)
                weight.assign(value + (0.0 if "pos" in weight.name else 1.0))
        return model

    @property
    def size(self):
        return self.config().input_size


def _hides(weight):
    """Layer scales near zero, a last gamma of zero, embeddings of zero, all the same."""
    numbers = weight.numpy()
    named = ("gamma", "ls1", "ls2", "layer_scale", "alpha", "embed", "token", "moving_variance")
    same = numbers.size > 1 and np.ptp(numbers) == 0
    return weight.dtype.is_floating and same and any(n in weight.name for n in named)


ARCHITECTURES = {
    "vit": Tiny(
        "vit_tiny_patch16_224",
        dict(_TRANSFORMER, input_size=(16, 16)),
        "qkv proj fc1 fc2",
        8,
    ),
    "deit_distilled": Tiny(
        "deit_tiny_distilled_patch16_224",
        dict(_TRANSFORMER, input_size=(16, 16)),
        "qkv proj fc1 fc2",
        8,
    ),
    "vit_hybrid": Tiny(
        "vit_base_r50_s16_384",
        dict(
            input_size=(32, 32),
            patch_size=1,
            patch_nb_blocks=(1,),
            embed_dim=8,
            nb_blocks=1,
            nb_heads=2,
        ),
        "qkv proj fc1 fc2",
        4,
    ),
    "cait": Tiny(
        "cait_xxs24_224",
        dict(_TRANSFORMER, input_size=(16, 16)),
        "qkv q k v proj fc1 fc2",
        20,
    ),
    "swin": Tiny(
        "swin_tiny_patch4_window7_224",
        dict(
            input_size=(16, 16),
            patch_size=2,
            embed_dim=8,
            window_size=4,
            nb_blocks=(2, 1),
            nb_heads=(1, 2),
            drop_path_rate=0.0,
        ),
        "qkv proj fc1 fc2",
        12,
        (32, 32),
    ),
    "pit_distilled": Tiny(
        "pit_ti_distilled_224",
        dict(_STAGES, input_size=(16, 16), patch_size=4, stride=4, embed_dim=(8, 16)),
        "qkv proj fc1 fc2",
        8,
    ),
    "pvt": Tiny(
        "pvt_tiny",
        dict(
            input_size=(32, 32),
            patch_size=(2, 2, 2, 2),
            embed_dim=(4, 4, 8, 8),
            nb_blocks=(1, 1, 1, 1),
            nb_heads=(1, 1, 2, 2),
            mlp_ratio=(2.0,) * 4,
            sr_ratio=(2, 1, 1, 1),
        ),
        "q kv proj fc1 fc2",
        20,
    ),
    "pvt_v2": Tiny(
        "pvt_v2_b0",
        dict(
            _STAGES,
            input_size=(32, 32),
            embed_dim=(8, 16),
            mlp_ratio=(2.0, 2.0),
            sr_ratio=(2, 1),
        ),
        "q kv proj fc1 fc2",
        10,
    ),
    "convnext": Tiny(
        "convnext_tiny",
        dict(input_size=(32, 32), embed_dim=(8, 8, 12, 16), nb_blocks=(1, 1, 2, 1)),
        "fc1 fc2",
        10,
    ),
    "mixer": Tiny("mixer_s16_224", _MIXER, "fc1 fc2", 8),
    "resmlp": Tiny("resmlp_12_224", _MIXER, "linear_tokens fc1 fc2", 6),
    "gmlp": Tiny("gmlp_s16_224", _MIXER, "fc1 proj fc2", 6),
    "gmixer": Tiny("gmixer_24_224", _MIXER, "fc1 fc2", 8),
    "poolformer": Tiny(
        "poolformer_s12",
        dict(input_size=(32, 32), embed_dim=(8, 8, 8, 8), nb_blocks=(1, 1, 1, 1)),
        "fc1 fc2",
        8,
    ),
    "convmixer": Tiny(
        "convmixer_768_32",
        dict(input_size=(16, 16), patch_size=(4, 4), embed_dim=8, depth=2, kernel_size=3),
        "1",
        2,
    ),
    "efficientnet": Tiny(
        "efficientnet_v2_b0",
        dict(
            input_size=(32, 32),
            stem_size=8,
            nb_features=16,
            channel_multiplier=1.0,
            architecture=(
                ("cn_r1_k3_s1_e1_c8_skip",),
                ("er_r1_k3_s2_e2_c8",),
                ("ir_r1_k3_s2_e2_c8_se0.25",),
            ),
        ),
        "conv conv_exp conv_pw conv_pwl conv_head",
        6,
    ),
    "mobilenet_v2": Tiny(
        "mobilenet_v2_050",
        dict(
            input_size=(32, 32),
            stem_size=8,
            nb_features=16,
            architecture=(("ds_r1_k3_s1_c16",), ("ir_r1_k3_s2_e2_c16",)),
        ),
        "conv_pw conv_pwl conv_head",
        4,
    ),
    "resnet": Tiny("resnet26d", _RESNET, "conv1 conv2 conv3", 12),
    "seresnext": Tiny(
        "seresnext50_32x4d",
        dict(_RESNET, cardinality=2, base_width=32),
        "conv1 conv2 conv3",
        12,
    ),
    "resnetv2": Tiny(
        "resnetv2_50x1_bitm",
        dict(input_size=(32, 32), nb_blocks=(1, 1), nb_channels=(128, 128), stem_width=32),
        "conv1 conv2 conv3",
        6,
    ),
    "vgg": Tiny(
        "vgg11_bn",
        dict(input_size=(32, 32), layers=(8, "M", 8, "M"), nb_features=16),
        "4 fc1 fc2",
        3,
    ),
    "segment_anything": Tiny(
        "sam_vit_b",
        dict(
            input_size=(32, 32),
            embed_dim=16,
            encoder_patch_size=8,
            encoder_embed_dim=16,
            encoder_nb_blocks=2,
            encoder_nb_heads=2,
            encoder_global_attn_indices=(1,),
            encoder_window_size=3,
            prompt_mask_hidden_dim=8,
            decoder_nb_heads=2,
            decoder_mlp_channels=16,
            decoder_iou_hidden_dim=8,
        ),
        "qkv proj lin1 lin2",
        8,
    ),
}
CLASSIFIERS = [name for name in ARCHITECTURES if name != "segment_anything"]


def digits(n, size, classes=3):
    """Pictures of handwritten digits from 0 on, as large as a model wants them."""
    import tensorflow as tf
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = np.flatnonzero(data.target < classes)[:n]
    pictures = data.images[chosen, :, :, None].astype("float32") / 16 - 0.5
    pictures = tf.image.resize(np.repeat(pictures, 3, axis=-1), size).numpy()
    return pictures, data.target[chosen].astype("int32")
