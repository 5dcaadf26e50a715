"""Random configs: the modules that real PEFT adapts in timm's model are adapted in tfimm's."""

import functools
from collections import Counter

import peft
import pytest
import tfimm
import timm
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper

import tfimm_lora as lora
from tests.helpers.selection import nightly_except
from tests.interop.random_peft import RandomConfigs, cases
from tfimm_lora.adapters.peft_targets import lora_arguments_from_peft
from tfimm_lora.layer_paths import is_suffix, value_for
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS
from tfimm_lora.zoo.weights.module_names import ModuleNames

MODELS = (
    "vit_tiny_patch16_224",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "efficientnet_b0",
)
PER_MODEL = cases(short=12, long=110)

ADAPTED = (torch.nn.Linear, torch.nn.Conv2d)


def timm_model(name):
    with torch.device("meta"):
        return timm.create_model(CHECKPOINTS[name].partition(".")[0])


@functools.cache
def modules_of(name):
    """The modules of the timm model, and whether PEFT supports each."""
    found = timm_model(name).named_modules()
    return {module: isinstance(x, ADAPTED) for module, x in found if module}


def owners(module, prefix):
    """The modules inside of one that have weights of their own."""
    return {f"{prefix}.{key}".rpartition(".")[0] for key in module.state_dict()}


def of_peft(name, fields):
    """What PEFT adapts, with rank and alpha, and which modules it trains whole."""
    wrapped = peft.get_peft_model(timm_model(name), peft.LoraConfig(**fields))
    adapted, whole = {}, set()
    for module, x in wrapped.base_model.model.named_modules():
        if isinstance(x, peft.tuners.lora.LoraLayer):
            adapted[module] = (x.r["default"], x.lora_alpha["default"])
        elif isinstance(x, ModulesToSaveWrapper) and "modules_to_save" not in module.split("."):
            whole |= owners(x.original_module, module)
    return adapted, whole


def of_ours(name, fields):
    model, names = ours(name)
    arguments = lora_arguments_from_peft(model, fields)
    found = lora.explain_targets(model, **arguments).adapted
    adapted = {}
    for path in found:
        rank, alpha = (
            value_for(path, arguments[f"lora_{what}_pattern"], arguments[f"lora_{what}"])
            for what in ("rank", "alpha")
        )
        adapted[names.modules[path]] = (rank, alpha)
    whole = {
        weight.key.rpartition(".")[0]
        for weight in names.weights
        for root in names.layers
        if any(is_suffix(root, entry) for entry in arguments["lora_train_modules"])
        and f"{weight.path}/".startswith(f"{root}/")
    }
    return adapted, whole


@functools.cache
def ours(name):
    model = tfimm.create_model(name)
    return model, ModuleNames(model)


def outcome(function, name, fields):
    """What a function returns, or "refused" and the reason."""
    try:
        return function(name, dict(fields)), ""
    except (ValueError, TypeError) as error:
        return "refused", f"{type(error).__name__}: {error}"


def without_counterpart(name, fields):
    """Modules without weights that PEFT tries to adapt, and that tfimm does not have."""
    config = peft.LoraConfig(**fields)
    known = ours(name)[1].paths
    found = timm_model(name).named_modules()
    return [
        module
        for module, x in found
        if module
        and module not in known
        and not owners(x, module)
        and check_target_module_exists(config, module)
    ]


@pytest.mark.parametrize("name", nightly_except(MODELS, ["vit_tiny_patch16_224", "resnet18"]))
@pytest.mark.filterwarnings("ignore")
def test_random_configs_adapt_the_same_modules_or_are_refused_by_both(name):
    told, wrong = Counter(), []
    for seed in PER_MODEL:
        fields = RandomConfigs(seed, modules_of(name)).targets()
        theirs, why = outcome(of_peft, name, fields)
        mine, why_not = outcome(of_ours, name, fields)
        if theirs == mine:
            told["refused by both" if theirs == "refused" else "the same modules"] += 1
        elif mine == "refused" and any("original_module" in m for m in theirs[0]):
            told[
                "refused here: LoRA inside of a module trained whole, PEFT cannot load it"
            ] += 1
        elif theirs == "refused" and without_counterpart(name, fields):
            told["refused by PEFT for a module that tfimm does not have"] += 1
        else:
            wrong.append(
                f"seed {seed}: {fields}\n  PEFT: {theirs} {why}\n  ours: {mine} {why_not}"
            )
    print(f"{name}, seeds {PER_MODEL.start} to {PER_MODEL.stop - 1}: {dict(told)}")
    assert not wrong, f"{len(wrong)} of {len(PER_MODEL)}\n" + "\n".join(wrong[:20])
