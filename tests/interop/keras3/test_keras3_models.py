"""Models that Keras 3 builds by name compute what timm's models of these names compute."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import tfimm_lora as lora
from tests.helpers.selection import nightly_except
from tests.interop import timm_models
from tfimm_lora.backend import keras3_backend
from tfimm_lora.zoo.keras3_models.build import build
from tfimm_lora.zoo.keras3_models.known import known

BACKEND = keras3_backend()

#: Tensors of timm that are not weights.
BUFFERS = re.compile(r"num_batches_tracked$|relative_position_index$|attn_mask$")

#: Our name, and the height and width. Of every family, every kind of layer.
MODELS = {
    "vit_tiny_patch16_224": 64,
    "vit_small_patch32_224.augreg_in21k_ft_in1k": 96,
    "deit_tiny_patch16_224": 48,
    "deit_tiny_distilled_patch16_224": 48,
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "vit_small_plus_patch16_dinov3_qkvb": 64,
    "vit_base_patch32_clip_224": 64,
    "vit_base_patch32_clip_quickgelu_224": 64,
    "vit_base_patch16_siglip_224": 64,
    "swin_tiny_patch4_window7_224": 224,
    "convnext_nano": 64,
    "convnext_tiny": 64,
    "resnet18": 64,
    "resnet50": 128,
    "resnet50c": 128,
    "resnet50d": 128,
    "resnet26t": 128,
    "efficientnet_b0": 64,
    "efficientnet_b1": 96,
    "efficientnet_lite0": 64,
    "efficientnet_lite1": 64,
    "pt_efficientnet_b0": 96,
    "pt_efficientnet_b1": 128,
    "tf_efficientnetv2_b0": 96,
    "tf_efficientnetv2_b3": 128,
    "mobilenet_v2_100": 96,
    "mobilenetv2_140": 64,
    "mobilenetv3_small_100": 64,
    "mobilenetv3_large_100": 96,
    "tf_mobilenetv3_large_100": 96,
    "tf_mobilenetv3_small_minimal_100": 64,
    "vgg11": 224,
    "densenet121": 64,
}

#: One of each family; the others run in `make test-nightly`.
QUICK = {
    *("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"),
    *("vit_base_patch32_clip_224", "convnext_nano", "resnet18", "efficientnet_lite0"),
    *("mobilenetv3_small_100", "densenet121"),
}

CLASSES = 10

#: Deep models with random weights amplify rounding: each layer agrees to 1e-7, the logits of
#: ResNet-50 to 5e-5 and those of EfficientNet-B1 to 2e-5. Wrong padding gives 4e-3.
TOLERANCES = {"resnet": 1e-4, "efficientnet": 5e-5}


@pytest.mark.parametrize("name", nightly_except(MODELS, QUICK))
def test_logits_agree_with_timm(name, tmp_path):
    size, row = MODELS[name], known(name)
    sized = row.family in ("vit", "deit", "dinov2", "clip", "siglip", "swin")
    theirs = timm_models.make(
        row.config.architecture,
        size,
        num_classes=CLASSES,
        **({"img_size": size} if sized else {}),
    )
    model, cfg = build(name, classes=CLASSES, input_size=(size, size))
    assert model.cfg is cfg and model.output_shape == (None, CLASSES)
    load(model, row.family, theirs)
    x = timm_models.images(size)
    with torch.no_grad():
        expected = theirs(timm_models.to_torch(x)).numpy()
    ours = model.predict(x, verbose=0)  # compiled: faster than each operation by itself
    timm_models.assert_agree(ours, expected, TOLERANCES.get(row.family, 1e-5))
    # Its checkpoint has timm's names, shapes and values, and is read by load_timm_weights.
    lora.save_timm_weights(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    wanted = {k: v.numpy() for k, v in theirs.state_dict().items() if not BUFFERS.search(k)}
    assert saved.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    before = model.get_weights()
    model.set_weights([np.zeros_like(value) for value in before])
    lora.load_timm_weights(model, tmp_path)
    np.testing.assert_allclose(model.predict(x, verbose=0), ours, rtol=1e-5, atol=1e-6)


# -- timm's weights, by hand ---------------------------------------------------------------

#: The patterns of our paths and timm's keys, in the order in which they are replaced.
VIT = {
    r"^vi_t_backbone/|^dei_t_backbone/|^dinov2_backbone/": "",
    r"^\w+_patching_and_embedding/": "embeddings/",
    r"^embeddings/(class|cls)_token": "cls_token",
    r"^embeddings/distillation_token": "dist_token",
    r"^embeddings/register_tokens": "reg_token",
    r"^embeddings/(interpolated_)?position_embeddings?(/embeddings)?$": "pos_embed",
    r"^embeddings/(patch_embeddings/projection|patch_embedding)": "patch_embed/proj",
    r"^\w+_encoder/transformer_block_(\d+)": lambda m: f"blocks/{int(m[1]) - 1}",
    r"^encoder/layers_(\d+)": r"blocks/\1",
    r"^\w+_encoder/ln/|^layernorm/": "norm/",
    r"/ln_": "/norm",
    r"/mha/|/attention/attention/": "/attn/",
    r"/attn/attention_output": "/attn/proj",
    r"/mlp/(dense_1|dense|weights_in)/": "/mlp/fc1/",
    r"/(mlp/dense_2|mlp/weights_out|output_layer/output)/": "/mlp/fc2/",
    r"layer_scale(\d)/lambda1": r"ls\1/gamma",
    r"^predictions_distillation": "head_dist",
    r"^predictions": "head",
}
DINOV3 = {
    r"^dinov3_backbone/": "",
    r"^embeddings/(class|cls)_token": "cls_token",
    r"^embeddings/register_tokens": "reg_token",
    r"^embeddings/patch_embeddings/projection": "patch_embed/proj",
    r"^encoder/layers_(\d+)": r"blocks/\1",
    r"^layernorm/": "norm/",
    r"/attention/([qv])_proj/bias": r"/attn/\1_bias",
    r"/attention/o_proj": "/attn/proj",
    r"/attention/q_proj": "/attn/query",
    r"/attention/k_proj": "/attn/key",
    r"/attention/v_proj": "/attn/value",
    r"/gate_proj/": "/fc1_g/",
    r"/down_proj/": "/fc2/",
    r"layer_scale(\d)/lambda1": r"gamma_\1",
    r"^predictions": "head",
}
CLIP = {
    r"^(clip|sig_lip)_vision_encoder/": "",
    r"^embedding/class_embedding": "cls_token",
    r"^embedding/position_embedding/embeddings": "pos_embed",
    r"^embedding/patch_embedding": "patch_embed/proj",
    r"^pre_layer_norm": "norm_pre",
    r"^encoder_block_(\d+)": r"blocks/\1",
    r"/layer_norm_?(\d)": r"/norm\1",
    r"^(post_)?layer_norm/": "norm/",
    r"/(attention|self_attn)/": "/attn/",
    r"/attn/attention_output": "/attn/proj",
    r"^(blocks/\d+)/dense_(\d)/": r"\1/mlp/fc\2/",
    r"^head/": "attn_pool/",
    r"^attn_pool/variable": "attn_pool/latent",
    r"^attn_pool/attn/": "attn_pool/",
    r"^attn_pool/layernorm": "attn_pool/norm",
    r"^predictions": "head",
}
SWIN = {
    r"^swin_transformer_backbone/": "",
    r"^patch_embedding/": "patch_embed/",
    r"conv_projection": "proj",
    r"^stage_(\d)/downsample": lambda m: f"layers/{int(m[1]) + 1}/downsample",
    r"^stage_(\d)/blocks_(\d+)": r"layers/\1/blocks/\2",
    r"attention_qkv": "qkv",
    r"attention_projection": "proj",
    r"^predictions": "head/fc",
}
CONVNEXT = {
    r"^convnext_stem/convnext_stem_conv": "stem/0",
    r"^convnext_stem/convnext_stem_layernorm": "stem/1",
    r"^convnext_downsampling_block_(\d)/\w+_layernorm_\d": lambda m: (
        f"stages/{int(m[1]) + 1}/downsample/0"
    ),
    r"^convnext_downsampling_block_(\d)/\w+_conv_\d": lambda m: (
        f"stages/{int(m[1]) + 1}/downsample/1"
    ),
    r"^convnext_stage_(\d)_block_(\d+)_": r"stages/\1/blocks/\2/",
    r"/depthwise_conv": "/conv_dw",
    r"/layernorm": "/norm",
    r"/pointwise_conv_": "/mlp/fc",
    r"/layer_scale/.*": "/gamma",
    r"^convnext_head_layernorm": "head/norm",
    r"^convnext_head_dense": "head/fc",
}
RESNET = {
    r"^res_net_backbone/": "",
    r"^stack(\d)_block(\d+)_": lambda m: f"layer{int(m[1]) + 1}/{m[2]}/",
    r"/0_conv": "/shortcut_conv",
    r"/0_bn": "/shortcut_bn",
    r"/(\d)_(conv|bn)": r"/\2\1",
    r"^predictions": "fc",
}
RULES = {
    "vit": VIT,
    "deit": VIT,
    "dinov2": VIT,
    "dinov3": DINOV3,
    "clip": CLIP,
    "siglip": CLIP,
    "swin": SWIN,
    "convnext": CONVNEXT,
    "resnet": RESNET,
}
SUFFIXES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
BLOCKS = {"query": 0, "key": 1, "value": 2}


def load(model, family, theirs):
    """Assign timm's weights; all of them must be used."""
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    variables = [
        (path, layer, variable)
        for path, layer in BACKEND.walk(model)
        for variable in BACKEND.own_variables(layer)
    ]
    if family not in RULES:
        in_order(variables, state)
        return
    used = set()
    variables = [x for x in variables if BACKEND.variable_name(x[2]) != "position_ids"]
    gated = any("gate_proj" in path for path, *_ in variables)
    for path, _, variable in variables:
        name = BACKEND.variable_name(variable)
        key = f"{path}/{name}"
        for pattern, replacement in RULES[family].items():
            key = re.sub(pattern, replacement, key)
        key = key.replace("/up_proj/", "/fc1_x/" if gated else "/fc1/")
        if family == "resnet":
            key = resnet_key(key, theirs)
        *before, last = key.split("/")
        parts, block = 3, BLOCKS.get(before[-1]) if before else None
        if block is not None:
            before[-1] = "qkv"
            if before[0] == "attn_pool":  # one query, and keys and values of the tokens
                parts, block = (2, block - 1) if block else (1, 0)
                before[-1] = "kv" if parts == 2 else "q"
        key = ".".join([*before, last])
        if key not in state:
            key = ".".join([*before, SUFFIXES.get(last, last)])
        value = state[key]
        used.add(key)
        if block is not None:
            value = np.split(value, parts)[block]
        if key == "pos_embed" and value.shape[1] < np.prod(variable.shape[:-1]):
            value = np.pad(value, ((0, 0), (1, 0), (0, 0)))
        assign(variable, value)
    assert used == set(state)


def resnet_key(key, theirs):
    """Names of the stem, and of shortcuts with pooling."""
    deep = not isinstance(theirs.conv1, torch.nn.Conv2d)
    if deep:
        places = {"conv1_conv": "conv1/0", "conv1_bn": "conv1/1", "conv2_conv": "conv1/3"}
        places |= {"conv2_bn": "conv1/4", "conv3_conv": "conv1/6", "conv3_bn": "bn1"}
    else:
        places = {"conv1_conv": "conv1", "conv1_bn": "bn1"}
    layer, _, name = key.rpartition("/")
    layer = places.get(layer, layer)
    if "shortcut" in layer:
        block = layer.rpartition("/")[0]
        shortcut = dict(theirs.named_modules())[block.replace("/", ".") + ".downsample"]
        first = next(i for i, m in enumerate(shortcut) if isinstance(m, torch.nn.Conv2d))
        layer = f"{block}/downsample/{first + ('bn' in layer.rpartition('/')[2])}"
    return f"{layer}/{name}"


def in_order(variables, state):
    """For models whose layers are in the order of execution in both libraries."""
    kinds = {"moving_mean": 2, "moving_variance": 3, "beta": 1, "bias": 1}
    ours = sorted(
        enumerate(variables),
        key=lambda x: (
            [p for p, *_ in variables].index(x[1][0]),
            kinds.get(BACKEND.variable_name(x[1][2]), 0),
        ),
    )
    assert len(ours) == len(state)
    for (_, (_, _, variable)), value in zip(ours, state.values()):
        assign(variable, value)


def assign(variable, value):
    """Assign a weight of torch in Keras' order of axes."""
    shape = tuple(variable.shape)
    if value.ndim == 4:
        depthwise = value.shape[1] == 1 and shape[-1] == 1
        value = value.transpose((2, 3, 0, 1) if depthwise else (2, 3, 1, 0))
    elif value.ndim == 2 and "table" not in variable.path:
        value = value.T
    assert value.size == np.prod(shape), (variable.path, value.shape, shape)
    variable.assign(value.reshape(shape))
