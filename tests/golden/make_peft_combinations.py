"""Make ``peft_combinations.npz`` beside this file: what real PEFT makes of several adapters.

    python -m tests.golden.make_peft_combinations     # with torch and peft installed

The file holds the factors of four adapters of a tiny model ("one/fc/a", ".../b", ".../scale")
and for every case of ``CASES``, which it holds as JSON, those that
``LoraModel.add_weighted_adapter`` gave. Ranks agree only in "one" and "two", and "two" does
not cover the layer "last".
"""

import tests.interop  # isort: skip # noqa: F401 (makes torchvision importable beside CPU torch)

import json
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

PATH = Path(__file__).with_name("peft_combinations.npz")

ADAPTERS = {
    "one": {"r": 3, "lora_alpha": 6},
    "two": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "wide": {"r": 5, "lora_alpha": 2},
    "last": {"r": 2, "lora_alpha": 2},
}
LAYERS = {name: ["fc", "conv", "pointwise", "table", "last"] for name in ADAPTERS}
LAYERS["two"] = ["fc", "conv", "pointwise", "table"]
LAYERS["last"] = ["last"]

#: Name -> adapters, weights, and what add_weighted_adapter is told.
CASES = {
    "linear": (["one", "two"], [0.7, 0.4], {}),
    "linear_negative": (["one", "two"], [1.0, -0.6], {"combination_type": "linear"}),
    "linear_alone": (["two"], [-2.0], {"combination_type": "linear"}),
    "cat": (["one", "two", "wide"], [0.7, -0.4, 1.5], {}),
    "svd": (["one", "two", "wide"], [0.7, -0.4, 1.5], {"svd_rank": 4}),
    "ties": (["one", "two"], [0.7, 0.4], {"density": 0.4}),
    "ties_frequency": (
        ["one", "two"],
        [0.7, 0.4],
        {"combination_type": "ties", "density": 0.9, "majority_sign_method": "frequency"},
    ),
    "magnitude_prune": (["one", "two"], [0.7, -0.4], {"density": 0.3}),
    "dare_linear": (["one", "two"], [0.7, -0.4], {"density": 1.0}),
    "dare_ties": (["one", "two"], [0.7, 0.4], {"density": 1.0}),
    "ties_svd": (["one", "wide", "last"], [0.7, 0.4, 1.0], {"density": 0.5, "svd_rank": 4}),
    "ties_svd_frequency": (
        ["one", "two", "wide"],
        [0.7, 0.4, 1.0],
        {
            "combination_type": "ties_svd",
            "density": 0.5,
            "majority_sign_method": "frequency",
            "svd_rank": 3,
        },
    ),
    "magnitude_prune_svd": (["one", "two", "wide"], [0.7, -0.4, 1.0], {"density": 0.2}),
    "dare_ties_svd": (["one", "two"], [0.7, 0.4], {"density": 1.0, "svd_rank": 5}),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(9, 8)
        self.conv = nn.Conv2d(3, 7, 3)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.table = nn.Embedding(11, 6)
        self.last = nn.Linear(6, 7)


def model():
    """PEFT's model with the adapters, whose factors are random."""
    torch.manual_seed(0)
    made = None
    for name, options in ADAPTERS.items():
        config = peft.LoraConfig(target_modules=LAYERS[name], **options)
        if made is None:
            made = peft.get_peft_model(Model(), config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in sorted(made.named_parameters()):
            if "lora_" in key:
                parameter.normal_()
    return made


def factors(made, name):
    """Layer -> A, B and scale of one adapter."""
    found = {}
    for layer in ("fc", "conv", "pointwise", "table", "last"):
        module = made.base_model.model.get_submodule(layer)
        if name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
        elif name in module.lora_embedding_A:
            a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            continue
        found[layer] = (a.detach().numpy(), b.detach().numpy(), module.scaling[name])
    return found


def main():
    made = model()
    arrays = {"cases": np.array(json.dumps(CASES))}

    def keep(name):
        for layer, (a, b, scale) in factors(made, name).items():
            arrays[f"{name}/{layer}/a"] = a
            arrays[f"{name}/{layer}/b"] = b
            arrays[f"{name}/{layer}/scale"] = np.float64(scale)

    for name in ADAPTERS:
        keep(name)
    for case, (names, weights, options) in CASES.items():
        options = {"combination_type": case, **options}
        made.add_weighted_adapter(names, weights, f"combined {case}", **options)
        keep(f"combined {case}")
    np.savez_compressed(PATH, **arrays)
    print(f"peft {peft.__version__}, torch {torch.__version__}: {len(arrays)} arrays")


if __name__ == "__main__":
    main()
