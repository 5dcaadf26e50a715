"""``lora_arguments_from_peft``: apply a PEFT config to a model by timm's module names."""

from __future__ import annotations

from typing import Any

from tfimm_lora.adapters.lora_arguments import exact_targets
from tfimm_lora.adapters.module_names import ModuleNames
from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layer_paths import index_of, is_suffix, matches, unmatched, value_for
from tfimm_lora.layers.conversion import supported
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.targeting import check_ready
from tfimm_lora.peft.fields import ALL_LINEAR


def lora_arguments_from_peft(model: Any, source: Any) -> dict[str, Any]:
    """Convert a PEFT config to the lora_* arguments for a model.

    The arguments adapt the layers that PEFT would adapt in timm's model. While
    ``LoRAConfig.from_peft`` keeps names as they are, this function translates them, as
    ``load_adapter`` does: in some families (Swin, PVTv2, PoolFormer) timm's names differ from
    tfimm's.

    Args:
        model: A built model without LoRA.
        source: As in ``LoRAConfig.from_peft``.

    Returns:
        Arguments for ``inject_lora`` and ``convert_to_lora_model``, with exact targets.

    Raises:
        FileNotFoundError, TypeError, ValueError: As ``LoRAConfig.from_peft``. Also ValueError
            if the config matches no layer, or the model has LoRA or is not built.

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
    config = LoRAConfig.from_peft(source)
    check_ready(model)
    names = ModuleNames(model)
    modules = {path: names.modules[path] for path, x in names.layers.items() if supported(x)}
    _check_names(config, modules, names)
    full = [p for p, module in names.modules.items() if _is_fully_trained(config, module)]
    heads = classifier_paths(model)
    chosen = {
        path: module
        for path, module in modules.items()
        if path not in full and _is_target(config, module, path in heads)
    }
    if not chosen:
        raise ValueError(
            f"Received a PEFT config with target_modules={config.lora_targets!r}, which "
            f"with its other fields leaves no layer of model '{model.name}' to adapt. "
            f"{_known(modules)}"
        )
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
        "lora_train_modules": [p for p in full if p.rpartition("/")[0] not in full],
    }


def _is_target(config: LoRAConfig, module: str, is_head: bool) -> bool:
    """Whether PEFT adapts a module that is not fully trained."""
    targets = config.lora_targets
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = None  # every layer but the classifier
    blocks: Any = config.lora_layers
    patterns: Any = config.lora_layers_pattern
    if config.lora_exclude is not None and matches(module, config.lora_exclude):
        return False
    matched = not is_head if targets is None else matches(module, targets)
    return matched and (blocks is None or index_of(module, patterns) in blocks)


def _is_fully_trained(config: LoRAConfig, module: str) -> bool:
    """Whether modules_to_save names a module or one around it."""
    levels = module.split(".")
    around = [".".join(levels[: i + 1]) for i in range(len(levels))]
    return any(is_suffix(m, name) for m in around for name in config.lora_train_modules)


def _check_names(config: LoRAConfig, modules: dict[str, str], names: ModuleNames) -> None:
    """Raise one ValueError for all names in the config that match no module."""
    adaptable, everything = list(modules.values()), list(names.modules.values())
    problems = [
        f"{name} with {entry!r}"
        for name, given in (
            ("target_modules", config.lora_targets),
            ("exclude_modules", config.lora_exclude),
        )
        for entry in unmatched(given, adaptable)
    ]
    exclude = config.lora_exclude
    if isinstance(exclude, str) and not any(matches(m, exclude) for m in adaptable):
        problems.append(f"exclude_modules with {exclude!r}")
    problems += [
        f"modules_to_save with {entry!r}"
        for entry in config.lora_train_modules
        if not any(f".{entry.replace('/', '.')}." in f".{m}." for m in everything)
    ]
    for name in ("rank_pattern", "alpha_pattern"):
        problems += [
            f"{name} with {key!r}"
            for key in getattr(config, f"lora_{name}")
            if not any(value_for(module, {key: True}, False) for module in adaptable)
        ]
    if problems:
        raise ValueError(
            f"Received a PEFT config with names that the model does not have: "
            f"{', '.join(problems)}. {_known(modules)}"
        )


def _known(modules: dict[str, str]) -> str:
    listed = list(modules.values())
    more = ", ..." if len(listed) > 20 else ""
    return f"Modules that can be adapted: {', '.join(listed[:20])}{more}."
