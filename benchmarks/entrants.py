"""Who is measured on which model: names, layers, and why some pairs do not exist."""

import dataclasses
import importlib.util

_BLOCKS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture, and how everyone calls it and the layers that are adapted.

    Attributes:
        name: in tfimm and in timm.
        batch: pictures in a batch.
        peft: ``target_modules`` of PEFT, the same layers as our defaults.
        keras: the equivalent in ``keras_models``, or None.
        small: for --quick: arguments of tfimm, and of timm.
    """

    name: str
    peft: tuple | str
    keras: str | None = None
    batch: int = 8
    small: tuple = ({}, {})


MODELS = {
    "vit_tiny": Model(
        "vit_tiny_patch16_224",
        _BLOCKS,
        "vit_tiny",
        small=({"nb_blocks": 1}, {"img_size": 32, "depth": 1}),
    ),
    "vit_small": Model("vit_small_patch16_224", _BLOCKS),
    "vit_base": Model("vit_base_patch16_224", _BLOCKS, "vit_base", batch=4),
    "convnext_tiny": Model(
        "convnext_tiny",
        _BLOCKS[2:],
        "ConvNeXtTiny",
        batch=4,
        small=({"nb_blocks": (1, 1, 1, 1)}, {"depths": (1, 1, 1, 1)}),
    ),
    "swin_tiny": Model("swin_tiny_patch4_window7_224", _BLOCKS, batch=4),
    "resnet50": Model("resnet50", r"layer\d+\..*\.conv[123]", "ResNet50"),
    "efficientnet_b0": Model(
        "efficientnet_b0", ("conv_pw", "conv_pwl", "conv_head"), "EfficientNetB0"
    ),
}

#: Contender -> (module that builds it, what it is).
CONTENDERS = {
    "floor": ("contenders_tfimm", "all frozen but the lowest bias"),
    "ours": ("contenders_tfimm", "tfimm_lora on tfimm's model"),
    "full": ("contenders_tfimm", "full fine-tuning"),
    "tfimm": ("contenders_tfimm", "tfimm's own LoRA"),
    "ours on Keras 3": ("contenders_keras3", "tfimm_lora on Keras' model"),
    "enable_lora": ("contenders_keras3", "Keras' enable_lora on the same model"),
    "ours on Keras 3, XLA": ("contenders_keras3", "compiled, as by jit_compile=True"),
    "enable_lora, XLA": ("contenders_keras3", "compiled, as by jit_compile=True"),
    "peft": ("contenders_torch", "timm's model with PEFT, on torch"),
}


def absent(contender, model):
    """Why a contender has no entry for a model, or None."""
    if contender == "tfimm" and not model.startswith("convnext"):
        return "has LoRA for ConvNeXt alone"
    if CONTENDERS[contender][0] == "contenders_keras3" and MODELS[model].keras is None:
        return "Keras has no such model"
    if compiled(contender) and model not in ("vit_tiny", "vit_base", "resnet50"):
        return "XLA has no fast depthwise convolution on the CPU"
    if contender == "peft":
        missing = [m for m in ("torch", "timm", "peft") if not importlib.util.find_spec(m)]
        if missing:
            return f"not installed: pip install {' '.join(missing)}"
    return None


def legacy(contender):
    """Whether a contender is on legacy Keras."""
    return CONTENDERS[contender][0] == "contenders_tfimm"


def compiled(contender):
    """Whether a contender's step is compiled by XLA."""
    return contender.endswith("XLA")
