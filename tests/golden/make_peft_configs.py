"""Make ``peft_configs.json`` beside this file with real PEFT: what its configs adapt in timm.

    python -m tests.golden.make_peft_configs    # after make test-interop, which installs PEFT

The models are those of ``make_timm``. Each entry holds the fields of a LoraConfig, as PEFT
writes them, and what PEFT made of them: the rank and the scale of every adapted module, and
the modules that it trains whole.
"""

import tests.interop  # isort: skip # noqa: F401 (makes timm importable beside CPU torch)

import json
from pathlib import Path

import peft
from peft.utils import ModulesToSaveWrapper

from tests.golden.make_timm import MODELS

FILE = Path(__file__).parent / "peft_configs.json"

#: name -> (model of make_timm, fields of PEFT's LoraConfig)
CASES = {
    "list": ("deit_distilled", dict(r=2, lora_alpha=3, target_modules=["qkv", "mlp.fc1"])),
    "one_path": ("deit_distilled", dict(target_modules=["blocks.1.attn.proj"])),
    "expression": (
        "deit_distilled",
        dict(r=3, target_modules=r".*\.(fc1|fc2)", exclude_modules=r"blocks\.0\..*"),
    ),
    "excluded_names": (
        "deit_distilled",
        dict(target_modules=["qkv", "proj"], exclude_modules=["blocks.1.attn.qkv", "proj"]),
    ),
    "block": (
        "deit_distilled",
        dict(target_modules=["fc1", "qkv"], layers_to_transform=[1], layers_pattern="blocks"),
    ),
    "one_of_two_levels": (
        "deit_distilled",
        dict(
            target_modules=["fc1"], layers_to_transform=0, layers_pattern=["nothing", "blocks"]
        ),
    ),
    "no_pattern": ("convnext", dict(target_modules=["fc1"], layers_to_transform=[1])),
    "stage": (
        "convnext",
        dict(
            target_modules=["fc1", "downsample.1"],
            layers_to_transform=[2, 3],
            layers_pattern="stages",
        ),
    ),
    "whole_modules": (
        "deit_distilled",
        dict(
            target_modules=["fc1", "proj"],
            modules_to_save=["head", "blocks.1.norm2", "blocks.0.mlp"],
            bias="all",
        ),
    ),
    "patterns": (
        "swin",
        dict(
            r=2,
            lora_alpha=6,
            target_modules=["reduction", "qkv"],
            rank_pattern={"layers.1.downsample.reduction": 3, "blocks.0.attn.qkv": 4},
            alpha_pattern={r"layers\.[0]\..*": 5},
            use_rslora=True,
            lora_dropout=0.1,
        ),
    ),
    "excluded_downsampling": (
        "swin",
        dict(
            target_modules=["reduction", "fc1"],
            exclude_modules=["layers.1.downsample.reduction"],
        ),
    ),
    "path_in_todays_names": (
        "pvt_v2",
        dict(
            r=1,
            target_modules=["stages.1.blocks.0.attn.q", "attn.kv"],
            modules_to_save=["head"],
            bias="lora_only",
        ),
    ),
    "stages_in_todays_names": ("poolformer", dict(target_modules=r"stages\.[12]\..*\.fc1")),
    "gaussian": (
        "resmlp",
        dict(r=5, lora_alpha=2.5, target_modules=["fc2"], init_lora_weights="gaussian"),
    ),
}


def of_peft(base, fields):
    """What PEFT makes of a config in a model of ``make_timm``."""
    config = peft.LoraConfig(**fields)
    told = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    wrapped = peft.get_peft_model(MODELS[base][0](), config).base_model.model
    adapted, whole = {}, []
    for name, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            adapted[name] = [module.r["default"], module.scaling["default"]]
        elif isinstance(module, ModulesToSaveWrapper):
            whole.append(name)
    return {"model": base, "fields": told, "adapted": adapted, "whole": whole}


def main():
    made = {name: of_peft(*case) for name, case in CASES.items()}
    FILE.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
