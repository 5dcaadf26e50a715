"""Make the small models and adapters with real transformers and PEFT.

    python -m tests.interop.hugging_face.make FOLDER [MODEL ...]

Every model has a folder:

    base/                 config.json and model.safetensors, by `save_pretrained`
    adapters/NAME/        adapter_config.json and adapter_model.safetensors, by PEFT
    batch.npz             pixel_values (channels first) and labels
    outputs.npz           the outputs for the batch: "base", "base_features" (AutoModel),
                          and one for each adapter

`index.json` lists the versions, models, adapters, and the names of modules in memory.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch import nn

from tests.interop.hugging_face.loading import load_model, new_model, run
from tests.interop.hugging_face.models import CLASSES, MODELS

#: The names of query, key, value as layers of their own, in all versions.
_QUERY_KEY_VALUE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
)


@torch.no_grad()
def randomize(model, seed, batch=None):
    """Give every parameter values that matter, and BatchNorm statistics of its inputs."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        scales = last in ("weight", "gamma", "lambda1", "logit_scale") or any(
            part in name for part in ("layer_scale", "lambda_", "lora_magnitude")
        )
        if "relative_position_bias_table" in name:
            parameter.copy_(0.5 * noise(parameter))
        elif "lora_magnitude" in name:
            parameter.mul_(1 + 0.2 * noise(parameter))
        elif parameter.squeeze().ndim <= 1:
            parameter.copy_(0.2 * noise(parameter) + (1.0 if scales else 0.0))
        elif last in ("weight", "bias"):
            parameter.copy_(noise(parameter) * parameter[0].numel() ** -0.5)
        else:  # tokens, position embeddings
            parameter.copy_(0.2 * noise(parameter))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms and batch is not None:
        for norm in norms:
            norm.momentum = None  # the mean over the batches that follow
            norm.reset_running_stats()
        model.train()
        for _ in range(3):
            model(pixel_values=torch.randn(batch, generator=generator))
        model.eval()


def query_key_value(model):
    """The last names of the query, key and value layers, or None."""
    leaves = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    return next((names for names in _QUERY_KEY_VALUE if set(names) <= leaves), None)


def last_name(name):
    """The last name of a module, with its parent's where it is a number."""
    *_, parent, last = ("", *name.split("."))
    return f"{parent}.{last}" if last.isdigit() else last


def convolutions(model):
    """The full names of the convolutions without groups."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.stride <= module.kernel_size
    ]


def adapters(name, model):
    """Name of adapter -> fields of its LoraConfig, or the reason why the model has none."""
    small = MODELS[name]
    names = query_key_value(model)
    classifiers = list(small.classifiers) or None
    few = list(small.targets) if names is None else [names[0], names[2]]
    linear = sorted(
        {
            last_name(n)
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear)
            and not any(n == c or n.startswith(c + ".") for c in small.classifiers)
        }
    )
    if not few:
        return {}
    found = {
        "classifier": dict(r=4, lora_alpha=8, target_modules=few, modules_to_save=classifiers),
        "rslora_bias": dict(r=3, target_modules=few, use_rslora=True, bias="all"),
        "lora_only_bias": dict(r=2, target_modules=few, bias="lora_only"),
        "dora": dict(r=2, target_modules=few, use_dora=True),
        "lora_bias": dict(r=2, target_modules=few, lora_bias=True),
        "features": dict(r=2, target_modules=few, task_type="FEATURE_EXTRACTION"),
    }
    targets = [m for n, m in model.named_modules() if n.endswith(tuple(few))]
    if any(getattr(m, "bias", None) is None for m in targets):
        found["lora_bias"] = "the layers have no bias"
    if small.classifiers == ():
        found["classifier"] = "no classifier"
    if small.architecture == "Backbone":
        found["features"] = "the module has no AutoModel"
    if linear:
        ranks = dict(zip(names or few, (2, 3, 5)))
        alphas = dict(zip(few[::-1], (7, 3)))
        found["patterns"] = dict(
            r=4,
            lora_alpha=6,
            target_modules=linear,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            modules_to_save=classifiers,
        )
        found["linear_dora"] = dict(r=2, target_modules=linear, use_dora=True)
    else:
        found["patterns"] = found["linear_dora"] = "no linear layers"
    if names:
        # The second half of the blocks, by an expression.
        found["expression"] = dict(
            r=2, target_modules=rf".*\.1\..*\.({names[0]}|{names[1]}|{names[2]})"
        )
        found["key_only"] = dict(r=2, target_modules=[names[1]])
    else:
        found["expression"] = found["key_only"] = "no query, key and value layers"
    kernels = convolutions(model)
    if small.convolutional:
        found["convolutions"] = dict(r=2, target_modules=kernels, modules_to_save=classifiers)
        found["dora_convolutions"] = dict(r=2, target_modules=kernels, use_dora=True)
    else:
        found["convolutions"] = dict(r=2, target_modules=few + kernels)
        found["dora_convolutions"] = "not a CNN"
    return found


def make_model(name, folder):
    """Make everything of one model; its entry of the index."""
    small = MODELS[name]
    torch.manual_seed(0)
    model = new_model(name)
    if model is None:
        return {"skipped": f"transformers {transformers.__version__} does not have it"}
    randomize(model, 0, (8, 3, small.size, small.size))
    model.save_pretrained(folder / "base")
    random = np.random.default_rng(1)
    batch = {
        "pixel_values": random.normal(size=(3, 3, small.size, small.size)).astype("float32"),
        "labels": random.integers(CLASSES, size=3),
    }
    np.savez(folder / "batch.npz", **batch)
    pixels = batch["pixel_values"]
    model = load_model(folder / "base")
    outputs = {"base": run(model, pixels)}
    entry = {
        "class": small.architecture,
        "classifiers": list(small.classifiers),
        "modules": [n for n, m in model.named_modules() if n and not list(m.children())],
        "parameters": [n for n, _ in model.named_parameters()],
        "query_key_value": query_key_value(model),
        "adapters": [],
        "skipped_adapters": {},
    }
    if small.architecture != "Backbone":
        features = load_model(folder / "base", features=True)
        outputs["base_features"] = run(features, pixels)
        entry["features_class"] = type(features).__name__
        entry["features_parameters"] = [n for n, _ in features.named_parameters()]
    for seed, (adapter, fields) in enumerate(adapters(name, model).items(), start=2):
        if isinstance(fields, str):
            entry["skipped_adapters"][adapter] = fields
            continue
        entry["adapters"].append(adapter)
        path = folder / "adapters" / adapter
        base = copy.deepcopy(features if adapter == "features" else model)
        adapted = peft.get_peft_model(base, peft.LoraConfig(lora_dropout=0.0, **fields)).eval()
        randomize_adapter(adapted, seed)
        adapted.save_pretrained(path)
        outputs[adapter] = run(adapted, pixels)
    np.savez(folder / "outputs.npz", **outputs)
    return entry


@torch.no_grad()
def randomize_adapter(adapted, seed):
    """Random factors, and other values for everything that an adapter's file holds."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapted.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in key:
            parameter.mul_(1 + 0.2 * noise)
        elif "lora_A" in key:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif "lora_B" in key:
            # Little in a CNN, where nothing normalizes what every layer adds.
            parameter.copy_((0.02 if parameter.ndim == 4 else 0.1) * noise)
        elif parameter.requires_grad:
            parameter.add_(0.1 * noise)


def main(folder, *names):
    folder = Path(folder)
    index = {
        "versions": {
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
        "models": {},
    }
    for name in names or MODELS:
        index["models"][name] = make_model(name, folder / name)
    (folder / "index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
