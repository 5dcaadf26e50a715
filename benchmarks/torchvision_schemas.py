"""Make a torchvision that was built for another torch importable. timm and PEFT import it."""

from __future__ import annotations

import contextlib

import torch


def define() -> None:
    """Define two operators that such a torchvision looks for, and nobody here uses.

    Call it before the first import of torchvision.
    """
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there
            torch.library.define(f"torchvision::{name}", arguments)
