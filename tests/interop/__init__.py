"""Tests against real timm, PEFT and torch, which `make test-interop` installs."""

import importlib.util

MISSING = [
    name
    for name in ("torch", "torchvision", "timm", "peft", "safetensors")
    if importlib.util.find_spec(name) is None
]


def import_torchvision():
    """torchvision, which timm imports, also where its own operators are missing.

    The registry's torchvision is built for CUDA; beside a CPU-only torch its library does
    not load, and the import fails because two schemas that timm never uses are unknown.
    """
    import sys

    import torch

    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision


if not MISSING:
    import_torchvision()
