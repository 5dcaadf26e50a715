"""Checkpoints that real timm wrote give the same logits in tfimm, for every family."""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import tfimm
import tfimm.architectures.segment_anything
import torch
from safetensors.torch import save_file

import tfimm_lora as lora
from tests.helpers.kerases import run
from tests.helpers.selection import nightly_except
from tests.interop import timm_models
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS
from tfimm_lora.zoo.weights.pretrained import create_pretrained

#: tfimm's name and the size of the images. Of every family the smallest variants that
#: between them have every kind of layer.
VARIANTS = {
    "cait_xxs24_224": 224,
    "convmixer_1024_20_ks9_p14": 112,
    "convnext_tiny": 64,
    "deit_tiny_distilled_patch16_224": 224,
    "ecaresnet26t": 96,
    "efficientnet_b0": 96,
    "efficientnet_es": 96,
    "efficientnet_lite0": 96,
    "efficientnet_v2_b0": 96,
    "gmixer_24_224": 224,
    "gmlp_s16_224": 224,
    "mixer_b16_224": 224,
    "mobilenet_v2_050": 96,
    "pit_ti_distilled_224": 224,
    "pit_ti_224": 224,
    "pt_efficientnet_b0": 96,
    "pvt_v2_b0": 64,
    "resmlp_12_224": 224,
    "resnet18": 96,
    "resnet50_gn": 96,
    "resnetblur50": 96,
    "resnetrs50": 96,
    "resnetv2_50x1_bitm": 96,
    "resnext50_32x4d": 96,
    "seresnext26t_32x4d": 96,
    "swin_tiny_patch4_window7_224": 224,
    "vgg11_bn": 224,
    "vit_tiny_patch16_224": 224,
    "vit_tiny_r_s16_p8_224": 224,
    "vit_small_r26_s32_224": 224,
}


@pytest.mark.parametrize(
    "name",
    nightly_except(
        VARIANTS,
        ["convnext_tiny", "efficientnet_b0", "resnet18", "pvt_v2_b0", "vit_tiny_patch16_224"],
    ),
)
def test_logits_agree_with_timm(name, tmp_path):
    size = VARIANTS[name]
    theirs = timm_models.make(CHECKPOINTS[name], size)
    model = tfimm.create_model(name)
    assert lora.load_timm_weights(model, timm_models.save(theirs, tmp_path)) is model
    x = timm_models.images(size)
    timm_models.assert_agree(run(model, x), timm_models.run(theirs, x))
    told = theirs.pretrained_cfg
    assert model.cfg.mean == told["mean"] and model.cfg.std == told["std"]
    assert model.cfg.crop_pct == told["crop_pct"]
    assert model.cfg.interpolation == told["interpolation"]


def test_poolformer_agrees_with_timm_up_to_the_order_of_pooling(tmp_path):
    """Its authors trained normalisation, then pooling, which is tfimm's order.

    timm pools first since 0.9. Everything before that order agrees, and with timm's own
    features put through the authors' head the logits agree.
    """
    theirs = timm_models.make("poolformer_s12.sail_in1k", 96)
    model = tfimm.create_model("poolformer_s12")
    lora.load_timm_weights(model, timm_models.save(theirs, tmp_path))
    x = timm_models.images(96)
    ours = run(model, x)
    with torch.no_grad():
        features = theirs.forward_features(timm_models.to_torch(x))
        head = theirs.head
        normal = torch.nn.functional.group_norm(
            features, 1, head.norm.weight, head.norm.bias, head.norm.eps
        )
        expected = head.fc(normal.mean((-2, -1))).numpy()
        theirs_logits = theirs(timm_models.to_torch(x)).numpy()
        bias = (head.fc(head.norm.bias)).numpy()
    timm_models.assert_agree(ours, expected)
    # timm's differ, by one positive factor for each image about the point that its biases
    # give: the mean is the same in either order, the deviation is not.
    assert np.abs(ours - theirs_logits).max() > 1e-2 * np.abs(theirs_logits).max()
    for mine, other in zip(ours - bias, theirs_logits - bias):
        factor = (mine @ other) / (other @ other)
        print(f"tfimm's logits are {factor:.3f} of timm's, less those of the biases")
        assert 0 < factor < 1
        np.testing.assert_allclose(mine, factor * other, atol=1e-4 * np.abs(mine).max())


def test_pvt_agrees_with_the_implementation_of_its_authors(tmp_path):
    """PVT is not in timm; tfimm has its authors' torch code, for its own tests."""
    theirs = authors_module("pvt").pvt_tiny(pretrained=False)
    torch.manual_seed(0)
    timm_models.prepare(theirs, lambda: torch.randn(2, 3, 224, 224))
    path = tmp_path / "pvt_tiny.safetensors"
    save_file(theirs.state_dict(), path)
    model = lora.load_timm_weights(tfimm.create_model("pvt_tiny"), path)
    x = timm_models.images(224)
    timm_models.assert_agree(run(model, x), timm_models.run(theirs, x))


def test_names_with_only_torch_files_are_loaded_by_tfimm(tmp_path, monkeypatch):
    theirs = authors_module("pvt").pvt_tiny(pretrained=False)
    torch.manual_seed(0)
    timm_models.prepare(theirs, None)
    torch.save(theirs.state_dict(), tmp_path / "pvt_tiny.pth")
    cfg = tfimm.models.model_config("pvt_tiny")
    monkeypatch.setattr(cfg, "url", f"[pytorch]file://{tmp_path}/pvt_tiny.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    model = create_pretrained(tfimm, "pvt_tiny")
    x = timm_models.images(224)
    timm_models.assert_agree(run(model, x), timm_models.run(theirs, x))


@functools.cache
def authors_module(name):
    """A module of tfimm.architectures.timm alone: the package as a whole overwrites what
    timm has registered for PVTv2 and PoolFormer."""
    folder = Path(tfimm.__file__).parent / "architectures" / "timm"
    spec = importlib.util.spec_from_file_location(f"authors_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_segment_anything_agrees_with_the_implementation_of_its_authors(tmp_path):
    """SAM is not in timm; tfimm has its authors' torch code, for its own tests."""
    from tfimm.architectures.segment_anything.torch import modeling

    width, size = 768, 128
    torch.manual_seed(0)
    grid = (size // 16, size // 16)
    theirs = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=size,
            embed_dim=width,
            depth=12,
            num_heads=12,
            qkv_bias=True,
            norm_layer=lambda n: torch.nn.LayerNorm(n, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=(2, 5, 8, 11),
            window_size=14,
            out_chans=256,
        ),
        prompt_encoder=modeling.PromptEncoder(256, grid, (size, size), 16),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=256,
            transformer=modeling.TwoWayTransformer(2, 256, 8, 2048),
        ),
    )
    timm_models.prepare(theirs, None)
    path = tmp_path / "sam.safetensors"
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("pixel_")}
    save_file(state, path)
    model = tfimm.create_model("sam_vit_b", input_size=(size, size))
    lora.load_timm_weights(model, path)
    x = timm_models.images(size)
    points = np.random.default_rng(0).uniform(0, size, (2, 3, 2)).astype("float32")
    labels = np.array([[1, 0, 1], [1, 1, 0]], "float32")
    with torch.no_grad():
        sparse, dense = theirs.prompt_encoder(
            (torch.from_numpy(points), torch.from_numpy(labels)), None, None
        )
        features = theirs.image_encoder(timm_models.to_torch(x))
        expected = [
            theirs.mask_decoder(
                image_embeddings=features[i : i + 1],
                image_pe=theirs.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[i : i + 1],
                dense_prompt_embeddings=dense[i : i + 1],
                multimask_output=True,
            )
            for i in range(2)
        ]
    inputs = dict(
        images=x,
        points=points,
        labels=labels,
        boxes=np.zeros((2, 0, 4), "float32"),
        masks=np.zeros((2, 0, *model.mask_size(model.cfg.input_size)), "float32"),
    )
    _, scores, logits = model(inputs, multimask_output=True, return_logits=True)
    theirs_logits, theirs_scores = (torch.cat(parts).numpy() for parts in zip(*expected))
    timm_models.assert_agree(logits.numpy(), theirs_logits)
    timm_models.assert_agree(scores.numpy(), theirs_scores)


def test_a_lora_model_takes_a_checkpoint(tmp_path):
    theirs = timm_models.make("vit_tiny_patch16_224", 224)
    folder = timm_models.save(theirs, tmp_path)
    model = lora.create_model("vit_tiny_patch16_224", lora_rank=2)
    factors = {v.name: v.numpy() for v in model.weights if "_lora_" in v.name}
    lora.load_timm_weights(model, folder)
    x = timm_models.images(224)
    # The factors B are zero at the start, so the outputs are those of the plain model.
    timm_models.assert_agree(run(model, x), timm_models.run(theirs, x))
    for variable in model.weights:
        if variable.name in factors:
            np.testing.assert_array_equal(variable.numpy(), factors[variable.name])
    created = lora.create_model("vit_tiny_patch16_224", model_path=str(folder))
    timm_models.assert_agree(run(created, x), timm_models.run(theirs, x))


def test_efficientnet_v2_b3_is_refused_because_its_channels_differ(tmp_path):
    """tfimm builds 24 channels in the first stage, timm 16, as the paper's code."""
    theirs = timm_models.make("tf_efficientnetv2_b3", 64)
    model = tfimm.create_model("efficientnet_v2_b3")
    with pytest.raises(ValueError, match=r"blocks.0.0.conv.weight has \(16, 40, 3, 3\)") as e:
        lora.load_timm_weights(model, timm_models.save(theirs, tmp_path))
    assert "expects (24, 40, 3, 3)" in str(e.value)


@pytest.mark.parametrize("size", [(300, 400), (224, 224), (517, 389), (200, 150)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_that_of_timm(size, crop_pct, interpolation):
    from PIL import Image
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    # Smooth, as pictures are: noise at the limit of resolution shows rounding only.
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size[::-1], Image.BICUBIC)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    theirs = create_transform(
        (3, 224, 224), crop_pct=crop_pct, interpolation=interpolation, mean=mean, std=std
    )
    expected = np.moveaxis(theirs(picture).numpy(), 0, -1)
    model = tfimm.create_model("resnet18", mean=mean, std=std)
    model.cfg.crop_pct, model.cfg.interpolation = crop_pct, interpolation
    ours = lora.create_preprocessing(model, resize=True)(np.asarray(picture)).numpy()
    # PIL rounds to whole numbers after each of its two passes, TensorFlow does not.
    assert np.abs((ours - expected) * np.array(std) * 255).max() <= 2.0
