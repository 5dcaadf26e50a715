"""Make ``timm_*.safetensors`` beside this file with real timm: tiny models and their logits.

    python -m tests.golden.make_timm        # after make test-interop, which installs timm

Each file holds the tensors of one model under timm's names; its logits for
``golden.images`` are in ``timm_logits.npz``. Where timm 0.9 changed the names, a second
file has the same tensors under the old ones, and timm's own conversion of old checkpoints
must turn it into the first.
"""

import tests.interop  # isort: skip # noqa: F401 (makes timm importable beside CPU torch)

import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from timm.layers import GroupNorm1
from timm.models import convnext, deit, metaformer, mlp_mixer, pvt_v2, resnet, swin_transformer
from torch import nn

from tests.golden import images
from tests.interop import timm_models

FOLDER = Path(__file__).parent


def swin():
    return swin_transformer.SwinTransformer(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        window_size=4,
        num_classes=3,
    )


def swin_old_name(key):
    key = re.sub(
        r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
    )
    return key.replace("head.fc.", "head.")


def pvt2():
    return pvt_v2.PyramidVisionTransformerV2(
        depths=(1, 1, 1, 1),
        embed_dims=(4, 4, 8, 8),
        num_heads=(1, 1, 2, 2),
        sr_ratios=(2, 1, 1, 1),
        mlp_ratios=(2, 2, 2, 2),
        num_classes=3,
    )


def pvt2_old_name(key):
    stage = re.match(r"stages\.(\d+)\.", key)
    number = int(stage[1]) + 1 if stage else 1
    key = key.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
    key = key.replace("patch_embed.", "patch_embed1.")
    key = re.sub(r"^stages\.\d+\.downsample", f"patch_embed{number}", key)
    key = re.sub(r"^stages\.\d+\.blocks", f"block{number}", key)
    return re.sub(r"^stages\.\d+\.norm", f"norm{number}", key)


def poolformer():
    return metaformer.MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(4, 6, 8, 10),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=3,
    )


def poolformer_old_name(key):
    key = key.replace("stem.conv", "patch_embed.proj")
    key = re.sub(r"layer_scale(\d)\.scale", r"layer_scale_\1", key)
    key = re.sub(
        r"^stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", key
    )
    key = re.sub(r"^stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", key)
    return key.replace("head.norm", "norm").replace("head.fc", "head")


def convnext_():
    return convnext.ConvNeXt(dims=(8, 8, 12, 16), depths=(1, 1, 2, 1), num_classes=3)


def deit_distilled():
    return deit.VisionTransformerDistilled(
        img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3
    )


def seresnet_deep():
    """A stem of three convolutions, pooling in the shortcuts, groups, squeeze-and-excite."""
    return resnet.ResNet(
        resnet.Bottleneck,
        layers=(1, 1, 1, 1),
        channels=(4, 4, 8, 8),
        cardinality=2,
        base_width=32,
        stem_type="deep",
        stem_width=4,
        avg_down=True,
        block_args=dict(attn_layer="se"),
        num_classes=3,
    )


def resmlp():
    return mlp_mixer.MlpMixer(
        img_size=16,
        patch_size=4,
        embed_dim=8,
        num_blocks=2,
        mlp_ratio=4,
        block_layer=mlp_mixer.ResBlock,
        norm_layer=mlp_mixer.Affine,
        num_classes=3,
    )


#: name -> (model, image size, old names and timm's conversion of them)
MODELS = {
    "swin": (swin, 16, (swin_old_name, swin_transformer.checkpoint_filter_fn)),
    "pvt_v2": (pvt2, 32, (pvt2_old_name, pvt_v2.checkpoint_filter_fn)),
    "poolformer": (poolformer, 32, (poolformer_old_name, metaformer.checkpoint_filter_fn)),
    "convnext": (convnext_, 32, None),
    "deit_distilled": (deit_distilled, 16, None),
    "seresnet_deep": (seresnet_deep, 32, None),
    "resmlp": (resmlp, 16, None),
}


def logits_of(name, model, x):
    if name != "poolformer":
        return timm_models.run(model, x)
    # Normalisation, then pooling, as its authors trained it; timm pools first.
    with torch.no_grad():
        features = model.forward_features(timm_models.to_torch(x))
        norm = model.head.norm
        normal = nn.functional.group_norm(features, 1, norm.weight, norm.bias, norm.eps)
        return model.head.fc(normal.mean((-2, -1))).numpy()


def main():
    logits = {}
    for name, (make, size, old) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        timm_models.prepare(model, lambda size=size: torch.randn(4, 3, size, size))
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(state, FOLDER / f"timm_{name}.safetensors")
        if old is not None:
            rename, convert = old
            renamed = {rename(k): v for k, v in state.items()}
            assert renamed.keys() != state.keys()
            back = convert(dict(renamed), model)
            assert back.keys() == state.keys(), back.keys() ^ state.keys()
            assert all(torch.equal(back[k], state[k]) for k in state)
            save_file(renamed, FOLDER / f"timm_{name}_old.safetensors")
        logits[name] = logits_of(name, model, images(size))
    np.savez_compressed(FOLDER / "timm_logits.npz", **logits)


if __name__ == "__main__":
    main()
