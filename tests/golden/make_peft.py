"""Make the folders ``peft_*`` beside this file with real PEFT: adapters of tiny timm models.

    python -m tests.golden.make_peft        # after make test-interop, which installs PEFT

The models are those of ``make_timm``; their logits with the adapter are in
``peft_logits.npz``.
"""

import tests.interop  # isort: skip # noqa: F401 (makes timm importable beside CPU torch)

import shutil

import numpy as np
import peft
import torch
from safetensors.torch import load_file

from tests.golden import images
from tests.golden.make_timm import FOLDER, MODELS, logits_of

#: name -> (model of make_timm, fields of PEFT's LoraConfig, type of the factors)
ADAPTERS = {
    "plain": ("deit_distilled", dict(r=2, lora_alpha=3, target_modules=["qkv", "fc1"]), None),
    "patterns": (
        "swin",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=r".*\.(qkv|reduction|fc2)",
            rank_pattern={"reduction": 3, r"layers\.0\.blocks\.1\.attn\.qkv": 1},
            alpha_pattern={"fc2": 5},
            use_rslora=True,
        ),
        None,
    ),
    "convolutions": (
        "convnext",
        dict(r=2, target_modules=["downsample.1", "mlp.fc1"], bias="all"),
        None,
    ),
    "classifier": (
        "pvt_v2",
        dict(r=1, target_modules=["q", "kv", "sr"], modules_to_save=["head"], bias="lora_only"),
        None,
    ),
    "float16": ("resmlp", dict(r=2, target_modules=["linear_tokens"]), torch.float16),
    "bfloat16": ("poolformer", dict(r=2, target_modules=["fc1"]), torch.bfloat16),
}


def main():
    logits = {}
    for name, (base, fields, dtype) in ADAPTERS.items():
        make, size, _ = MODELS[base]
        model = make()
        model.load_state_dict(load_file(FOLDER / f"timm_{base}.safetensors"))
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    size_of = 0.5 if "lora_" in key else 0.1
                    parameter.add_(torch.randn_like(parameter) * size_of)
                if "lora_" in key and dtype is not None:
                    parameter.data = parameter.data.to(dtype)
        folder = FOLDER / f"peft_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        wrapped.save_pretrained(str(folder))
        (folder / "README.md").unlink()
        for parameter in wrapped.parameters():
            parameter.data = parameter.data.float()
        logits[name] = logits_of(base, wrapped.base_model.model, images(size))
    np.savez_compressed(FOLDER / "peft_logits.npz", **logits)


if __name__ == "__main__":
    main()
