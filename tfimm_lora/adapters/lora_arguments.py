"""``lora_arguments``: the LoRA that an adapter needs in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.fit import weight_values
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.model_names import in_names_of
from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.adapters.torch_layout import can_have_dropout
from tfimm_lora.config import LoRAConfig
from tfimm_lora.layers.einsum_dense import positions_of
from tfimm_lora.layers.qkv import layout_of
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.zoo.weights.module_names import ModuleNames


def lora_arguments(model: Any, adapter: AdapterData) -> dict[str, Any]:
    """Return all fields of the ``LoRAConfig`` with which a model can hold an adapter.

    What an adapter does not determine (the initialization, whether A is frozen, the
    regularizer) has its default.

    Raises:
        ValueError: If a layer or weight of the adapter does not fit; see ``check_fits``.
    """
    names = ModuleNames(model)
    adapter = in_names_of(names, adapter)
    weight_values(names, adapter)
    updates = {names.paths[module]: x for module, x in adapter.layers.items()}
    qkv, layers = _common_qkv(updates), [names.layers[path] for path in updates]
    ranks = {path: _lora_rank(names.layers[path], x, qkv) for path, x in updates.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(x.scale for x in updates.values()).most_common(1)[0][0]
    dotted = {path: path.replace("/", ".") for path in updates}
    alphas = {dotted[path]: x.scale * ranks[path] for path, x in updates.items()}
    # Without an alpha the scale is 1 at any rank.
    unscaled = all(x.scale == 1 for x in updates.values())
    heads = classifier_paths(model)
    full = [path for module in adapter.modules for path in layers_of_module(names, module)]
    has_heads = bool(heads) and set(heads) <= set(full)
    config = LoRAConfig(
        lora_rank=rank,
        lora_alpha=None if unscaled else scale * rank,
        lora_rank_pattern=exact_pattern({dotted[p]: ranks[p] for p in updates}, rank),
        lora_alpha_pattern={} if unscaled else exact_pattern(alphas, scale * rank),
        lora_use_dora=adapter.use_dora,
        lora_use_loha=adapter.use_loha,
        lora_bias=adapter.branch_bias,
        # Without effect on what the adapter computes, so it is no reason to refuse one.
        lora_dropout=adapter.dropout if all(map(can_have_dropout, layers)) else 0.0,
        lora_targets=exact_targets(list(updates), list(names.layers)),
        lora_qkv=qkv,
        lora_train_bias=adapter.bias,
        lora_train_modules=exact_names(
            [path for path in full if not (has_heads and path in heads)], names.layers
        ),
        lora_train_classifier=has_heads,
    )
    return config.arguments()


def exact_targets(paths: list[str], all_paths: list[str]) -> list[str] | str:
    """Return the ``lora_targets`` that match these layers and no others."""
    chosen = set(paths)
    ends_others = any(
        other.endswith("/" + path)
        for path in chosen
        for other in all_paths
        if other not in chosen
    )
    if not ends_others and not any("#" in path for path in paths):
        return paths
    return "|".join(re.escape(path) for path in paths)


def layers_of_module(names: ModuleNames, module: str) -> list[str]:
    """Return the paths of the layers of a fully trained module.

    It is one path if the module has a layer of its own with the same weights. A module that is
    only a list in torch has none, and in some families a layer has another place than in timm
    (the downsampling of Swin): then it is the paths of the layers that own the weights.
    """
    inside = _owners(names, module, current=True) or _owners(names, module, current=False)
    path = names.paths.get(module)
    if path is not None and inside:
        below = [w.path for w in names.weights if f"{w.path}/".startswith(f"{path}/")]
        if set(below) == set(inside):
            return [path]
    return inside


def exact_names(paths: list[str], all_paths: Iterable[str]) -> list[str]:
    """Return names that mean exactly these layers where a name may be the end of a path.

    A path that is also the end of another one begins with a separator.
    """
    others = list(all_paths)
    return [
        f"/{path}" if any(x.endswith(f"/{path}") for x in others) else path for path in paths
    ]


def _owners(names: ModuleNames, module: str, current: bool) -> list[str]:
    """Return the paths of the layers whose weights a module has, by current or older keys."""
    found = [
        weight.path
        for weight in names.weights
        for key in ((weight.key,) if current else weight.old_keys)
        if key.startswith(f"{module}.")
    ]
    return list(dict.fromkeys(found))


def _lora_rank(layer: Any, update: LayerUpdate, qkv: str | None) -> int:
    """Return the ``lora_rank`` for an update, which files may store with a larger rank."""
    if update.kind == "batched":
        return update.rank // positions_of(layer)
    return update.rank // (len(update.qkv[0]) if qkv and update.qkv else 1)


def _common_qkv(updates: dict[str, LayerUpdate]) -> str | None:
    """Return the ``lora_qkv`` of an adapter, if one value describes all its layers.

    Otherwise fused projections are loaded at the larger rank of the file, which is as exact.
    """
    layouts = {path: layout_of(path) or "" for path in updates}
    fused = {path: x.qkv for path, x in updates.items() if x.qkv}
    if not fused or not all(updates[path].moves_only_its_blocks() for path in fused):
        return None
    single = [layout for layout in layouts.values() if len(layout) == 1]
    letters = "".join([*single, *(qkv[0] for qkv in fused.values())])
    chosen = "".join(letter for letter in "qkv" if letter in letters)
    for path, layout in layouts.items():
        expected = "".join(letter for letter in layout if letter in chosen)
        if fused.get(path) != ((expected, layout) if len(layout) > 1 else None):
            return None
    return chosen
