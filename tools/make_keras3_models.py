"""Write tfimm_lora/zoo/keras3_models/models.json: timm's models that Keras 3 can build.

Run ``python tools/make_keras3_models.py`` in an environment with timm and torch; with names of
timm's modules ("resnet convnext") it reads only their models again. It creates
each model of timm that belongs to a family of ``tfimm_lora/zoo/keras3_models``, without
memory for its weights, and reads its dimensions from its layers. A model that differs from
what keras_hub and keras.applications build is listed with the reason.
``tests/interop/keras3`` compares the outputs with timm's.
"""

import json
import re
import sys
from pathlib import Path

import timm
import torch
from timm.layers import ClassifierHead, LayerScale, NormMlpClassifierHead
from timm.models import (
    _efficientnet_blocks,
    convnext,
    deit,
    densenet,
    efficientnet,
    eva,
    mobilenetv3,
    pvt_v2,
    resnet,
    swin_transformer,
    vgg,
    vision_transformer,
)
from timm.models._registry import _model_default_cfgs
from torch import nn

from tfimm_lora.zoo import keras3_models

TABLE = Path(keras3_models.__file__).parent / "models.json"


class Refused(Exception):
    """A model that neither library builds; the message is the reason."""


#: The name of the model that is read.
NAME = ""


def require(condition, reason):
    """Raise ``Refused`` unless a condition holds."""
    if not condition:
        raise Refused(reason)


def only(values, reason):
    """The only value among several."""
    distinct = list(dict.fromkeys(values))
    require(len(distinct) == 1, reason)
    return distinct[0]


def is_gelu(module):
    """Whether an activation is the exact GELU, of torch or timm."""
    return type(module).__name__ == "GELU" and getattr(module, "approximate", "none") == "none"


def gelu_name(module):
    """keras_hub's name of an activation of CLIP or SigLIP."""
    if is_gelu(module):
        return "gelu"
    names = {"GELU": "gelu_approximate", "GELUTanh": "gelu_approximate"}
    names["QuickGELU"] = "quick_gelu"
    require(type(module).__name__ in names, "its activation is not a GELU")
    return names[type(module).__name__]


# -- families ------------------------------------------------------------------------------


def vit(model):
    """ViT and DeiT without distillation; DINOv2, which has layer scales; CLIP and SigLIP."""
    require(
        type(model) in (vision_transformer.VisionTransformer, deit.VisionTransformerDistilled),
        "its class in timm is another one than that of ViT",
    )
    if found := re.search(r"_(clip|siglip)_(?!gap)", NAME):
        return clip(model) if found[1] == "clip" else siglip(model)
    blocks = list(model.blocks)
    first = blocks[0]
    require(
        all(type(b) is vision_transformer.Block for b in blocks),
        "its blocks differ from those of ViT",
    )
    require(model.pos_embed is not None, "it has no absolute position embedding")
    require(
        type(model.patch_embed).__name__ == "PatchEmbed", "its stem is not a patch embedding"
    )
    require(model.has_class_token and model.cls_token is not None, "it has no class token")
    require(model.attn_pool is None, "it pools by attention")
    require(model.global_pool == "token", "it pools the mean of the patches")
    require(isinstance(model.norm_pre, nn.Identity), "it normalizes before the first block")
    require(isinstance(model.fc_norm, nn.Identity), "it normalizes after pooling")
    require(isinstance(model.norm, nn.LayerNorm), "its final normalization differs")
    require(isinstance(first.attn.q_norm, nn.Identity), "it normalizes queries and keys")
    require(first.attn.qkv.bias is not None, "its projections have no biases")
    require(first.attn.proj.bias is not None, "its projections have no biases")
    require(
        first.attn.qkv.out_features == 3 * model.embed_dim, "its heads have another dimension"
    )
    epsilon = only(
        [m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)], "it has two epsilons"
    )
    arguments = {
        "patch_size": only(model.patch_embed.patch_size, "its patches are not square"),
        "hidden_dim": model.embed_dim,
        "num_layers": len(blocks),
        "num_heads": first.attn.num_heads,
        "mlp_dim": first.mlp.fc1.out_features,
    }
    swiglu = type(first.mlp).__name__ != "Mlp"
    if not swiglu:
        require(is_gelu(first.mlp.act), "its activation is not the exact GELU")
    if isinstance(first.ls1, LayerScale):
        require(epsilon == 1e-6, f"its normalization has the epsilon {epsilon}")
        if swiglu:
            require(type(first.mlp).__name__ == "GluMlp", "its MLP differs from DINOv2's")
            require(
                isinstance(first.mlp.act, nn.SiLU) and not first.mlp.gate_last,
                "its MLP differs from DINOv2's",
            )
        require("dinov2" in NAME, "it has layer scales, which the ViT of keras_hub has not")
        require(
            model.no_embed_class == bool(model.num_reg_tokens),
            "its position embedding differs from DINOv2's",
        )
        arguments["registers"] = model.num_reg_tokens
        arguments["swiglu"] = swiglu
        if swiglu:  # keras_hub takes two thirds of it, for each of both halves
            arguments["mlp_dim"] = arguments["mlp_dim"] // 2 * 3 // 2
        return "dinov2", arguments
    require(not swiglu, "its MLP differs from ViT's")
    require(not model.num_reg_tokens, "it has register tokens")
    require(not model.no_embed_class, "its class token has no position embedding")
    require(model.patch_embed.proj.bias is not None, "its patch embedding has no bias")
    arguments["epsilon"] = epsilon
    return ("deit" if hasattr(model, "dist_token") else "vit"), arguments


def plain_blocks(model):
    """The dimensions of the blocks of CLIP and SigLIP, as keras_hub names them."""
    blocks = list(model.blocks)
    first = blocks[0]
    require(all(type(b) is vision_transformer.Block for b in blocks), "its blocks differ")
    require(isinstance(model.fc_norm, nn.Identity), "it normalizes after pooling")
    require(isinstance(model.norm, nn.LayerNorm), "its final normalization differs")
    require(isinstance(first.attn.q_norm, nn.Identity), "it normalizes queries and keys")
    require(isinstance(first.ls1, nn.Identity), "it has layer scales")
    require(type(first.mlp).__name__ == "Mlp", "its MLP differs")
    require(
        first.attn.qkv.out_features == 3 * model.embed_dim, "its heads have another dimension"
    )
    require(
        first.attn.qkv.bias is not None and first.attn.proj.bias is not None,
        "its projections have no biases",
    )
    require(not model.num_reg_tokens, "it has register tokens")
    require(model.pos_embed is not None, "it has no absolute position embedding")
    return {
        "patch_size": only(model.patch_embed.patch_size, "its patches are not square"),
        "hidden_dim": model.embed_dim,
        "num_layers": len(blocks),
        "num_heads": first.attn.num_heads,
        "intermediate_dim": first.mlp.fc1.out_features,
        "intermediate_activation": gelu_name(first.mlp.act),
    }


def clip(model):
    """The image encoder of CLIP."""
    require(model.has_class_token and model.attn_pool is None, "it has no class token")
    require(model.global_pool == "token", "it pools the mean of the patches")
    require(not model.no_embed_class, "its class token has no position embedding")
    require(isinstance(model.norm_pre, nn.LayerNorm), "its first normalization differs")
    require(model.patch_embed.proj.bias is None, "its patch embedding has a bias")
    require(
        all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm)),
        "its normalization has another epsilon",
    )
    arguments = plain_blocks(model)
    require(
        arguments["intermediate_activation"] != "gelu_approximate", "its activation differs"
    )
    return "clip", arguments


def siglip(model):
    """The image encoder of SigLIP with its pooling by attention."""
    pool = model.attn_pool
    require(pool is not None and not model.has_class_token, "it does not pool by attention")
    require(isinstance(model.norm_pre, nn.Identity), "it normalizes before the first block")
    require(model.patch_embed.proj.bias is not None, "its patch embedding has no bias")
    require(
        all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm)),
        "its normalization has another epsilon",
    )
    arguments = plain_blocks(model)
    require(
        pool.latent_len == 1
        and pool.pool == "token"
        and pool.pos_embed is None
        and isinstance(pool.q_norm, nn.Identity)
        and pool.num_heads == arguments["num_heads"]
        and pool.mlp.fc1.out_features == arguments["intermediate_dim"]
        and gelu_name(pool.mlp.act) == arguments["intermediate_activation"],
        "its pooling by attention differs",
    )
    return "siglip", arguments


def dinov3(model):
    """DINOv3, which is the only model of timm's EVA that keras_hub has."""
    require("dinov3" in NAME, "neither keras_hub nor keras.applications has its blocks")
    first = model.blocks[0]
    require(type(model.rope).__name__ == "RotaryEmbeddingDinoV3", "its positions differ")
    require(model.rope.temperature == 100 and model.rope.rotate_half, "its positions differ")
    require(model.rope.normalize_coords == "separate", "its positions differ")
    require(isinstance(model.norm, nn.LayerNorm), "its final normalization differs")
    require(isinstance(model.fc_norm, nn.Identity), "it normalizes after pooling")
    require(model.global_pool == "avg", "its pooling differs")
    require(isinstance(first.attn.q_norm, nn.Identity), "it normalizes queries and keys")
    require(first.attn.proj.bias is not None, "its projections have no biases")
    require(
        all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm)),
        "its normalization has another epsilon",
    )
    gated = type(first.mlp).__name__ == "SwiGLU"
    if gated:
        require(isinstance(first.mlp.act, nn.SiLU), "its MLP differs")
    else:
        require(is_gelu(first.mlp.act), "its activation is not the exact GELU")
    width = first.mlp.fc1_x if gated else first.mlp.fc1
    return "dinov3", {
        "patch_size": only(model.patch_embed.patch_size, "its patches are not square"),
        "hidden_dim": model.embed_dim,
        "num_layers": len(model.blocks),
        "num_heads": first.attn.num_heads,
        "mlp_dim": width.out_features,
        "registers": model.num_prefix_tokens - 1,
        "gated": gated,
        "qkv_bias": first.attn.q_bias is not None,
    }


def swin(model):
    """Swin Transformer."""
    require(
        type(model) is swin_transformer.SwinTransformer, "its class is another one than Swin's"
    )
    stages = list(model.layers)
    windows = [b.window_size for s in stages for b in s.blocks]
    height, width = only(windows, "its stages have different windows")
    require(height == width, "its windows are not square")
    require(
        all(m.eps == 1e-5 for m in model.modules() if isinstance(m, nn.LayerNorm)),
        "its normalization has another epsilon",
    )
    require(is_gelu(stages[0].blocks[0].mlp.act), "its activation is not the exact GELU")
    return "swin", {
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
        "depths": [len(s.blocks) for s in stages],
        "num_heads": [s.blocks[0].attn.num_heads for s in stages],
        "window_size": height,
    }


def convnext_(model):
    """ConvNeXt."""
    blocks = [b for s in model.stages for b in s.blocks]
    first = blocks[0]
    require(
        all(type(b) is convnext.ConvNeXtBlock for b in blocks), "its blocks are of another kind"
    )
    require(
        len(model.stem) == 2 and model.stem[0].kernel_size == (4, 4),
        "its stem is not one convolution of 4x4",
    )
    require(
        isinstance(model.head, (ClassifierHead, NormMlpClassifierHead))
        and isinstance(model.norm_pre, nn.Identity),
        "it normalizes before pooling",
    )
    norms = (model.stem[1], first.norm, model.head.norm)
    require(all(isinstance(m, nn.LayerNorm) for m in norms), "it has RMSNorm, not LayerNorm")
    require(first.gamma is not None, "it has no layer scale")
    require(
        not hasattr(first.mlp, "grn") or isinstance(first.mlp.grn, nn.Identity), "it has GRN"
    )
    require(isinstance(model.head.pre_logits, nn.Identity), "its head has a hidden layer")
    require(is_gelu(first.mlp.act), "its activation is not the exact GELU")
    require(first.conv_dw.kernel_size == (7, 7), "its kernels are not 7x7")
    require(first.conv_dw.bias is not None, "its convolutions have no biases")
    require(
        all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm)),
        "its normalization has another epsilon than 1e-6",
    )
    return "convnext", {
        "depths": [len(s.blocks) for s in model.stages],
        "projection_dims": [s.blocks[0].conv_dw.out_channels for s in model.stages],
    }


def resnet_(model):
    """ResNet, also with the deep stem and the pooled shortcuts of ResNet-D."""
    require(type(model) is resnet.ResNet, "its class is another one than ResNet's")
    layers = [model.layer1, model.layer2, model.layer3, model.layer4]
    blocks = [b for layer in layers for b in layer]
    kind = only([type(b) for b in blocks], "it mixes kinds of blocks")
    require(kind in (resnet.BasicBlock, resnet.Bottleneck), "its blocks are of another kind")
    require(
        all(b.se is None for b in blocks),
        "it has channel attention (SE, ECA or another)",
    )
    blurs = [getattr(b, "aa", None) for b in blocks]
    require(
        all(x is None or isinstance(x, nn.Identity) for x in blurs),
        "it blurs before it strides",
    )
    norms = [m for n, m in model.named_modules() if re.search(r"(bn\d|downsample\.[12])$", n)]
    norms = [m for m in norms if not isinstance(m, (nn.Conv2d, nn.Identity))]
    require(
        all(isinstance(m, nn.BatchNorm2d) and m.eps == 1e-5 for m in norms),
        "it does not normalize by BatchNorm with the epsilon 1e-5",
    )
    require(
        all(isinstance(b.act1, nn.ReLU) for b in blocks),
        "its activation is not ReLU",
    )
    require(isinstance(model.maxpool, nn.MaxPool2d), "its stem has no max-pooling")
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    require(all(m.groups == 1 for m in convolutions), "its convolutions have groups (ResNeXt)")
    widths = [layer[0].conv1.out_channels for layer in layers]
    require(widths == [64, 128, 256, 512], "its blocks are wider")
    if kind is resnet.Bottleneck:
        outputs = [layer[0].conv3.out_channels for layer in layers]
        require(outputs == [256, 512, 1024, 2048], "its blocks are wider")
        inner = [layer[0].conv2.out_channels for layer in layers]
        require(inner == widths, "its blocks are wider")
    shortcuts = [layer[0].downsample for layer in layers]
    pooled = any(isinstance(s[0], nn.AvgPool2d) for s in shortcuts if s is not None)
    require(
        kind is resnet.Bottleneck or not pooled,
        "keras_hub adds a convolution to the first shortcut, which timm has not",
    )
    strides = [layer[0].conv2.stride[0] for layer in layers]
    if kind is resnet.BasicBlock:
        strides = [layer[0].conv1.stride[0] for layer in layers]
    require(strides == [1, 2, 2, 2], "its strides differ")
    stem = [model.conv1] if isinstance(model.conv1, nn.Conv2d) else model.conv1
    stem = [m for m in stem if isinstance(m, nn.Conv2d)]
    require(
        [m.stride[0] for m in stem] == [2, 1, 1][: len(stem)], "the strides of its stem differ"
    )
    name = "bottleneck_block" if kind is resnet.Bottleneck else "basic_block"
    return "resnet", {
        "input_conv_filters": [m.out_channels for m in stem],
        "input_conv_kernel_sizes": [m.kernel_size[0] for m in stem],
        "stackwise_num_blocks": [len(layer) for layer in layers],
        "block_type": name + ("_vd" if pooled else ""),
    }


#: The coefficients of width and depth, which timm's models do not record.
EFFICIENTNETS = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}


def efficientnet_(model):
    """EfficientNet, also Lite and V2, and MobileNetV2."""
    same = type(model.conv_stem).__name__ == "Conv2dSame"
    epsilon = only(
        [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)], "it has two epsilons"
    )
    if found := re.fullmatch(r"(tf_)?efficientnet_(b\d|l2|lite\d)", NAME):
        width, depth = EFFICIENTNETS[found[2]]
        require(same == bool(found[1]), "its padding is not that of its name")
        require(epsilon == (1e-3 if same else 1e-5), f"its BatchNorm has the epsilon {epsilon}")
        return "efficientnet", {
            "width": width,
            "depth": depth,
            "lite": found[2].startswith("lite"),
            "same_padding": same,
        }
    if found := re.fullmatch(r"tf_efficientnetv2_(b[0-3]|[sml])", NAME):
        require(same and epsilon == 1e-3, "its padding or epsilon differs")
        return "efficientnetv2", {"variant": found[1].upper()}
    if found := re.fullmatch(r"mobilenetv2_(\d\d\d)", NAME):
        require(not same and epsilon == 1e-5, "its padding or epsilon differs")
        return "mobilenetv2", {"alpha": int(found[1]) / 100}
    raise Refused(
        "neither keras_hub nor keras.applications has blocks with its sizes and its padding"
    )


def mobilenetv3_(model):
    """MobileNetV3."""
    require(type(model) is mobilenetv3.MobileNetV3, "its class is another one")
    same = type(model.conv_stem).__name__ == "Conv2dSame"
    epsilon = only(
        [m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)], "it has two epsilons"
    )
    found = re.fullmatch(r"(tf_)?mobilenetv3_(small|large)_(minimal_)?(\d\d\d)", NAME)
    require(found, "neither keras_hub nor keras.applications has its blocks")
    if found[1]:
        require(same and epsilon == 1e-3, "its padding or epsilon differs")
        return "mobilenetv3_same", {
            "large": found[2] == "large",
            "alpha": int(found[4]) / 100,
            "minimalistic": bool(found[3]),
        }
    require(not same and epsilon == 1e-5 and not found[3], "its padding or epsilon differs")
    return "mobilenetv3", mobilenetv3_stages(model)


def mobilenetv3_stages(model):
    """The arguments of keras_hub's MobileNetBackbone."""
    stages = [list(s) for s in model.blocks]
    first, *middle, last = stages
    require(len(first) == 1, "its first stage has several blocks")
    block = first[0]
    require(
        isinstance(block, _efficientnet_blocks.DepthwiseSeparableConv),
        "its first block differs",
    )
    require(len(last) == 1, "its last stage has several blocks")

    def rows(read):
        return [[read(b) for b in stage] for stage in middle]

    def ratio(block):
        se = getattr(block, "se", None)
        return None if se is None or isinstance(se, nn.Identity) else 0.25

    acts = {"ReLU": "relu", "Hardswish": "hard_swish", "HardswishMe": "hard_swish"}

    def activation(b):
        return acts[type(b.bn2.act).__name__]

    se = block.se if not isinstance(block.se, nn.Identity) else None
    return {
        "stackwise_num_blocks": [len(s) for s in middle],
        "stackwise_expansion": rows(lambda b: b.conv_pw.out_channels),
        "stackwise_num_filters": rows(lambda b: b.conv_pwl.out_channels),
        "stackwise_kernel_size": rows(lambda b: b.conv_dw.kernel_size[0]),
        "stackwise_num_strides": rows(lambda b: b.conv_dw.stride[0]),
        "stackwise_se_ratio": rows(ratio),
        "stackwise_activation": rows(activation),
        "stackwise_padding": rows(lambda b: b.conv_dw.kernel_size[0] // 2),
        "input_num_filters": model.conv_stem.out_channels,
        "depthwise_filters": block.conv_pw.out_channels,
        "depthwise_stride": block.conv_dw.stride[0],
        "depthwise_residual": block.has_skip,
        "squeeze_and_excite": None
        if se is None
        else se.conv_reduce.out_channels / block.conv_dw.out_channels,
        "last_layer_filter": last[0].conv.out_channels,
        "num_features": model.conv_head.out_channels,
    }


def vgg_(model):
    """VGG without BatchNorm."""
    require(not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()), "it has BatchNorm")
    repeats, filters = [0], []
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            repeats[-1] += 1
            filters[len(repeats) - 1 :] = [layer.out_channels]
        elif isinstance(layer, nn.MaxPool2d):
            repeats.append(0)
    return "vgg", {"stackwise_num_repeats": repeats[:-1], "stackwise_num_filters": filters}


def densenet_(model):
    """DenseNet with the dimensions of keras.applications."""
    require(type(model) is densenet.DenseNet, "its class is another one")
    found = re.fullmatch(r"densenet(121|169|201)", NAME)
    require(found, "keras.applications has DenseNet121, DenseNet169 and DenseNet201 only")
    return "densenet", {"variant": found[1]}


def pvt_v2_(model):
    """PVTv2, which differs from keras_hub's MiT."""
    raise Refused(
        "the MLPs of keras_hub's MiT have another width, and the tanh approximation of GELU"
    )


#: The modules of timm, and the function that reads their models.
MODULES = {
    vision_transformer: vit,
    deit: vit,
    swin_transformer: swin,
    convnext: convnext_,
    resnet: resnet_,
    efficientnet: efficientnet_,
    eva: dinov3,
    mobilenetv3: mobilenetv3_,
    vgg: vgg_,
    densenet: densenet_,
    pvt_v2: pvt_v2_,
}

# -- the table -----------------------------------------------------------------------------


def preprocessing(cfg):
    """The fields of a tag: mean, std, input size, crop, interpolation and classes."""
    return [
        list(cfg.mean),
        list(cfg.std),
        list(cfg.input_size[1:]),
        cfg.crop_pct,
        cfg.interpolation,
        cfg.num_classes,
    ]


def tags(name):
    """The tags of an architecture that have a checkpoint on the hub, the default one first."""
    default = _model_default_cfgs[name]
    found = {}
    for tag, cfg in default.cfgs.items():
        if tag and (cfg.hf_hub_id or cfg.url):
            found[tag] = preprocessing(cfg)
    first = next(iter(default.tags), "")
    return {tag: found[tag] for tag in sorted(found, key=lambda t: t != first)}


def table(chosen):
    """The content of models.json; all modules that are not chosen keep their content."""
    global NAME
    before = json.loads(TABLE.read_text()) if chosen else {"models": {}, "refused": {}}
    built, refused = {}, {}
    for module, read in MODULES.items():
        short = module.__name__.rpartition(".")[2]
        for name in timm.list_models(module=short):
            if chosen and short not in chosen:
                kept = "models" if name in before["models"] else "refused"
                {"models": built, "refused": refused}[kept][name] = before[kept][name]
                continue
            NAME = name
            classes = {"num_classes": 1000} if read not in (vit, dinov3) else {}
            cfg = timm.get_pretrained_cfg(name)
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, **classes)
                family, arguments = read(model)
            except Refused as error:
                refused[name] = str(error)
                continue
            built[name] = {
                "family": family,
                "arguments": arguments,
                "parameters": sum(p.numel() for p in model.parameters()),
                "default": preprocessing(cfg),
                "tags": tags(name),
            }
            print(name, family, flush=True)
    return {"models": built, "refused": refused}


def text(content):
    """JSON with one value of a model a line."""
    lines = []
    for name, model in content["models"].items():
        fields = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in model.items() if k != "tags"]
        rows = [f"    {json.dumps(t)}: {json.dumps(v)}" for t, v in model["tags"].items()]
        fields.append('"tags": {' + ("\n" + ",\n".join(rows) + "\n   " if rows else "") + "}")
        lines.append(f"  {json.dumps(name)}: {{\n   " + ",\n   ".join(fields) + "\n  }")
    refused = [f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in content["refused"].items()]
    return (
        '{\n "models": {\n'
        + ",\n".join(lines)
        + '\n },\n "refused": {\n'
        + ",\n".join(refused)
        + "\n }\n}\n"
    )


if __name__ == "__main__":
    TABLE.write_text(text(table(sys.argv[1:])))
