"""On torch: timm's model with PEFT, with and without torch.compile."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from contender import Contender
from measure import Entry
from models import CLASSES, RANK, family_of, name_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torchvision_schemas  # isort: skip - of benchmarks/

#: The layers that tfimm_lora adapts by default.
TARGETS = {
    "vit": r".*blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)",
    "convnext": r".*blocks\.\d+\.mlp\.fc[12]",
    "resnet": r".*layer\d\.\d+\.conv\d",
}


def build(entry: Entry, small: bool) -> Contender:
    torchvision_schemas.define()
    import timm
    from peft import LoraConfig, get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    family = family_of(entry)
    mixed = entry.measurement == "mixed batch"
    net = timm.create_model(name_of(entry, small), num_classes=CLASSES)
    # Channels last is the faster layout of convolutions on such devices.
    layout = torch.contiguous_format if family == "vit" else torch.channels_last
    pictures = torch.randn(entry.batch, 3, 224, 224, device=device)
    pictures = pictures.contiguous(memory_format=layout)
    labels = torch.arange(entry.batch, device=device) % CLASSES
    plain_net = net.to(device, memory_format=layout).eval()
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS[family],
        modules_to_save=[net.default_cfg["classifier"]],
    )
    autocast = entry.dtype == "bfloat16"

    def forward(call: Any, **arguments: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return call(pictures, **arguments)

    if mixed:
        return _mixed_batch(plain_net, config, forward, entry.batch)
    # Batch normalization in inference mode, as with ours; nothing else depends on the mode.
    model = get_peft_model(plain_net, config).to(device).eval()
    call = torch.compile(model) if entry.contender.endswith("compile") else model
    variables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(variables, 1e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = forward(call)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return Contender(run, wait, peak, device_name(), sum(p.numel() for p in variables))


def _mixed_batch(net: Any, config: Any, forward: Any, batch: int) -> Contender:
    """Each row with an adapter of its own, as ``adapter_names`` of PEFT."""
    from peft import get_peft_model

    plain_net = copy.deepcopy(net)
    names = [f"a{i}" for i in range(batch)]
    model = get_peft_model(net, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def plain() -> None:
        with torch.inference_mode():
            forward(plain_net)

    def run() -> None:
        with torch.inference_mode():
            forward(model, adapter_names=names)

    return Contender(run, wait, peak, device_name(), 0, plain)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
