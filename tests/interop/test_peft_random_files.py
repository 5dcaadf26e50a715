"""Random adapters written by real PEFT, loaded one after another into the same tfimm model."""

import copy
import random
import warnings
from collections import Counter

import numpy as np
import peft
import pytest
import tfimm
import torch

import tfimm_lora as lora
from tests.helpers.kerases import run
from tests.helpers.selection import nightly_except
from tests.interop import timm_models
from tests.interop.random_peft import RandomConfigs, cases
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS

#: tfimm's name -> the size of the images.
MODELS = {
    "vit_tiny_patch16_224": 64,
    "resnet18": 64,
    "convnext_tiny": 32,
    "efficientnet_b0": 64,
    "swin_tiny_patch4_window7_224": 224,
}
SEEDS = cases(short=4, long=50)
DTYPES = (None, None, torch.float16, torch.bfloat16)


def base(name):
    sized = {"img_size": MODELS[name]} if name.startswith("vit") else {}
    return timm_models.make(CHECKPOINTS[name], MODELS[name], num_classes=10, **sized)


def like(model, tmp_path):
    """The tfimm model with the weights of a timm model."""
    name, theirs = model
    sized = {"input_size": (MODELS[name],) * 2} if name.startswith("vit") else {}
    mine = tfimm.create_model(name, nb_classes=10, **sized)
    return lora.load_timm_weights(mine, timm_models.save(theirs, tmp_path / "base"))


def trained(theirs, fields, seed, dtype):
    """A timm model with a PEFT adapter whose trained values all moved, in the type of files."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**fields))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            noise = torch.randn_like(parameter)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif "lora_" in name:
                size = 0.2 / parameter.shape[1] ** 0.5 if parameter.ndim > 1 else 0.2
                parameter.copy_(noise * size)
            elif parameter.requires_grad:
                parameter.add_(noise * 0.05)
            if dtype is not None and parameter.requires_grad:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    return wrapped.eval()


def write(wrapped, folder, dtype):
    """Save the adapter, in 16 bits if a type is given."""
    from safetensors.torch import load_file, save_file

    wrapped.save_pretrained(str(folder))
    if dtype is not None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        kept = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(kept, path, metadata={"format": "pt"})


@torch.no_grad()
def logits(wrapped, x):
    return wrapped(timm_models.to_torch(x)).numpy()


@torch.no_grad()
def rounding(theirs, folder, x, expected):
    """How far PEFT's own logits are from those in float64, relative to the largest.

    Some random adapters make activations grow a hundredfold, and rounding errors with them.
    """
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), str(folder)).eval().double()
    exact = wrapped(timm_models.to_torch(x).double()).numpy()
    return np.abs(expected - exact).max() / np.abs(exact).max()


def reloaded(theirs, folder, x):
    """What PEFT computes with the file, or the error with which it refuses its own file."""
    try:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), str(folder)).eval()
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        return None, f"{type(error).__name__}: {error}"[:200]
    return logits(loaded, x), ""


def written_by_peft(theirs, configs, seed, folder, x):
    """The next adapter of a sequence of random configs that PEFT accepts."""
    while True:
        fields = configs.adapter()
        dtype = random.Random(seed).choice(DTYPES)
        try:
            wrapped = trained(theirs, fields, seed, dtype)
        except (ValueError, TypeError):
            continue
        write(wrapped, folder, dtype)
        return fields, dtype, reloaded(theirs, folder, x)


def loaded(model, folder, x):
    """What the live model computes with the file, or the error with which it is refused."""
    try:
        lora.load_adapter(model, folder)
    except ValueError as error:
        return None, str(error)
    return run(model, x), ""


def says(fields, why):
    """Whether the file is refused for a reason that the documentation names."""
    return "convolution with groups" in why or "it has no bias into which" in why


@pytest.mark.parametrize("name", nightly_except(MODELS, ["vit_tiny_patch16_224", "resnet18"]))
@pytest.mark.filterwarnings("ignore")
def test_files_of_peft_loaded_one_after_another_give_its_logits(name, tmp_path):
    theirs = base(name)
    modules = {
        module: isinstance(x, (torch.nn.Linear, torch.nn.Conv2d))
        for module, x in theirs.named_modules()
        if module
    }
    model, x = like((name, theirs), tmp_path), timm_models.images(MODELS[name])
    plain = run(model, x)
    told, wrong, largest = Counter(), [], 0.0
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        configs = RandomConfigs(seed, modules)
        fields, dtype, (expected, why) = written_by_peft(theirs, configs, seed, folder, x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mine, why_not = loaded(model, folder, x)
        case = f"seed {seed}: {fields} {dtype}"
        alarms = [str(w.message) for w in caught if "its config" in str(w.message)]
        if expected is None and mine is None:
            told["refused by both"] += 1
        elif mine is None and says(fields, why_not):
            told["refused here, as documented"] += 1
        elif expected is None or mine is None:
            wrong.append(f"{case}\n  PEFT: {why or 'loads'}\n  ours: {why_not or 'loads'}")
        else:
            error = np.abs(mine - expected).max() / np.abs(expected).max()
            largest = max(largest, error)
            told["the same logits"] += 1
            if error > 1e-4:
                own = rounding(theirs, folder, x, expected)
                told["of which PEFT itself rounds by more than 5e-5"] += int(own > 5e-5)
                if error > 3 * own:
                    wrong.append(f"{case}: relative error {error:.1e}, of PEFT {own:.1e}")
            if alarms:
                wrong.append(f"{case}: {alarms}")
            if seed % 5 == 0:
                lora.merge_lora_weights(model)
                merged = np.abs(run(model, x) - expected).max() / np.abs(expected).max()
                if merged > 1e-3:
                    wrong.append(f"{case}: merged, relative error {merged:.1e}")
    if any(True for _ in lora_layers(model)):
        lora.remove_lora(model, merge=False)
    np.testing.assert_array_equal(run(model, x), plain)
    print(
        f"{name}, seeds {SEEDS.start} to {SEEDS.stop - 1}: {dict(told)}; largest relative "
        f"error {largest:.1e}"
    )
    assert not wrong, f"{len(wrong)} of {len(SEEDS)}\n" + "\n".join(wrong[:20])
