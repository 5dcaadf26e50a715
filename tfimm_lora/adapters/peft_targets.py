"""``lora_arguments_from_peft``: apply a PEFT config to a model by timm's module names."""

from __future__ import annotations

import warnings
from typing import Any

from tfimm_lora.adapters.lora_arguments import exact_names, exact_targets, layers_of_module
from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.adapters.torch_layout import sure_kind
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layer_paths import value_for
from tfimm_lora.layers.conversion import supported
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.targeting import check_ready
from tfimm_lora.peft.matching import PeftSelection, outermost, with_parents
from tfimm_lora.peft.translation import read_fields, with_grouped_patterns
from tfimm_lora.zoo.weights.module_names import ModuleNames


def lora_arguments_from_peft(model: Any, source: Any) -> dict[str, Any]:
    """Convert a PEFT config to the lora_* arguments for a model.

    The arguments adapt the layers that PEFT would adapt in timm's model, by PEFT's own rules. A
    target that is the full name of a module is adapted whatever layers_to_transform says;
    modules_to_save matches the end of a name, after a dot or not. While
    ``LoRAConfig.from_peft`` keeps names as they are, this function translates them, as
    ``load_adapter`` does: in some families (Swin, PVTv2, PoolFormer) timm's names differ from
    tfimm's. "all-linear", and a config without target_modules, mean every supported layer
    except the classifier.

    Args:
        model: A built model without LoRA.
        source: As in ``LoRAConfig.from_peft``.

    Returns:
        Arguments for ``inject_lora`` and ``convert_to_lora_model``, with exact targets.

    Raises:
        FileNotFoundError, TypeError, ValueError: As ``LoRAConfig.from_peft``. Also ValueError
            if the config matches no layer, or one that PEFT refuses to adapt (a container, a
            normalization, a grouped convolution); or if the model has LoRA or is not built.

    Warns:
        UserWarning: If the config has names that the model does not have. PEFT ignores them.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.adapters.peft_targets import lora_arguments_from_peft
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc1"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> peft = {"r": 2, "target_modules": r"fc\\d", "modules_to_save": ["head"]}
        >>> arguments = lora_arguments_from_peft(model, peft)
        >>> arguments["lora_targets"], arguments["lora_train_modules"]
        (['fc1'], ['head'])
    """
    fields = read_fields(source)
    config = LoRAConfig.from_peft(with_grouped_patterns(fields))
    check_ready(model)
    names = ModuleNames(model)
    modules = {path: names.modules[path] for path, x in names.layers.items() if supported(x)}
    selection = PeftSelection.of(fields)
    heads = classifier_paths(model)
    whole = outermost(m for m in with_parents(names.modules.values()) if selection.trains(m))
    full = [path for module in whole for path in layers_of_module(names, module)]
    if selection.targets is None or selection.is_all_linear:
        chosen = {
            p: m for p, m in modules.items() if p not in heads and not selection.excludes(m)
        }
    else:
        chosen = {path: m for path, m in modules.items() if selection.adapts(m)}
    _warn_of_unknown_names(fields, selection, modules, names)
    if not chosen:
        raise ValueError(
            f"Received a PEFT config with target_modules={fields.get('target_modules')!r}, "
            f"which with its other fields leaves no layer of model '{model.name}' to adapt. "
            f"{_known(modules)}"
        )
    _refuse_what_peft_refuses(selection, names, chosen, whole)
    ranks, alphas = {}, {}
    for path, module in chosen.items():
        dotted = path.replace("/", ".")
        ranks[dotted] = value_for(module, config.lora_rank_pattern, config.lora_rank)
        alphas[dotted] = value_for(module, config.lora_alpha_pattern, config.lora_alpha)
    return {
        **config.arguments(),
        "lora_rank_pattern": exact_pattern(ranks, config.lora_rank),
        "lora_alpha_pattern": exact_pattern(alphas, config.lora_alpha),
        "lora_targets": exact_targets(list(chosen), list(names.layers)),
        "lora_exclude": None,
        "lora_layers": None,
        "lora_layers_pattern": None,
        "lora_train_modules": exact_names(full, names.layers),
    }


def _refuse_what_peft_refuses(
    selection: PeftSelection, names: ModuleNames, chosen: dict[str, str], whole: list[str]
) -> None:
    """Raise a ValueError that names the modules that PEFT selects, but refuses to adapt."""
    problems = [
        f"{module} (in the fully trained {root})"
        for module in chosen.values()
        for root in whole
        if module == root or module.startswith(f"{root}.")
    ]
    if names.is_tfimm and isinstance(selection.targets, (str, tuple)):
        adapted = set(chosen.values())
        if not selection.is_all_linear:
            problems += [
                f"{module} (not a linear layer, convolution or embedding)"
                for module in with_parents(names.modules.values())
                if module not in adapted and selection.adapts(module)
            ]
        problems += [
            f"{module} (a grouped convolution)"
            for path, module in chosen.items()
            if sure_kind(names.layers[path]) in ("grouped", "depthwise")
        ]
    if problems:
        more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"Received a PEFT config with target_modules={selection.targets!r}, which selects "
            f"modules that PEFT does not adapt: {', '.join(problems[:10])}{more}. Name the "
            "layers to adapt, or exclude these in exclude_modules."
        )


def _warn_of_unknown_names(
    fields: dict[str, Any],
    selection: PeftSelection,
    modules: dict[str, str],
    names: ModuleNames,
) -> None:
    """Warn of all names in the config that match no module. PEFT ignores them."""
    adaptable = list(modules.values())
    everything = with_parents(names.modules.values())
    unknown = []
    for name in ("target_modules", "exclude_modules"):
        given = fields.get(name) or ()
        if isinstance(given, str):
            known = name == "target_modules" or any(map(selection.excludes, everything))
            unknown += [] if known else [f"{name} with {given!r}"]
            continue
        unknown += [
            f"{name} with {entry!r}"
            for entry in given
            if not any(f".{module}".endswith(f".{entry}") for module in everything)
        ]
    used = {selection.trained_by(module) for module in everything}
    unknown += [f"modules_to_save with {x!r}" for x in selection.fully_trained if x not in used]
    for name in ("rank_pattern", "alpha_pattern"):
        unknown += [
            f"{name} with {key!r}"
            for key in fields.get(name) or ()
            if not any(value_for(module, {key: True}, False) for module in adaptable)
        ]
    if unknown:
        warnings.warn(
            f"The PEFT config has names that model '{names.model.name}' does not have, and "
            f"that have no effect: {', '.join(unknown)}. {_known(modules)}",
            stacklevel=3,
        )


def _known(modules: dict[str, str]) -> str:
    listed = list(modules.values())
    more = ", ..." if len(listed) > 20 else ""
    return f"Modules that can be adapted: {', '.join(listed[:20])}{more}."
