"""adapter_config.json: what PEFT's LoraConfig says, and what of it is understood here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.config import scale
from tfimm_lora.layer_paths import without_counts
from tfimm_lora.peft.fields import (
    OWN_TYPE,
    PLAIN_FIELDS,
    PeftFields,
    is_same,
    unsupported,
    whole,
)

#: Longer expressions take long to compile alone.
_LONGEST_PATTERN = 1000

#: Initialisers after which the base weights are those of the checkpoint.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftConfig(PeftFields):
    """The fields of an adapter_config.json, checked.

    Args:
        fields: The parsed file.

    Raises:
        ValueError: for a field of a wrong type, or for one that is not supported; all of
            them are named.
    """

    def __init__(self, fields: Any) -> None:
        super().__init__(fields)
        self.own = fields["peft_type"] == OWN_TYPE
        _refuse_unsupported(fields)

    def scale_of(self, module: str, rank: int) -> float:
        """The scale of a module whose A has this rank.

        Raises:
            ValueError: if the config gives the module another rank.
        """
        said = value_by_pattern(module, self.rank_pattern, self.rank)
        if said != rank:
            raise ValueError(f"gives {module} the rank {said}, its tensors have {rank}")
        alpha = value_by_pattern(module, self.alpha_pattern, self.alpha)
        return scale(rank, alpha, self.use_rslora)


def value_by_pattern(module: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key that matches the end of a module path, as in PEFT."""
    for key, value in pattern.items():
        if _ends_with(module, key):
            return value
    return default


def _ends_with(module: str, key: str) -> bool:
    literal = re.sub(r"\\(.)", r"\1", key)
    if re.escape(literal) == key or re.fullmatch(r"[\w.]*", key):
        # A name. Without its backslashes a "." may stand for any character, as in PEFT.
        tail = module[-len(literal) :] if literal else ""
        same = len(tail) == len(literal) and all(
            a == b or (b == "." and "\\" not in key) for a, b in zip(tail, literal)
        )
        before = module[: -len(literal)] if literal else module
        return same and (not before or before.endswith("."))
    # An expression of a stranger may take for ever, which the standard library cannot stop.
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            "Patterns in an adapter's config that are more than names need regex: pip "
            "install regex"
        ) from error
    if len(key) > _LONGEST_PATTERN:
        raise ValueError(f"has a pattern of {len(key)} characters ({key[:40]!r}...)")
    try:
        return regex.match(rf"(.*\.)?({key})$", module, timeout=0.5) is not None
    except TimeoutError as error:
        raise ValueError(f"has the pattern {key!r}, which takes too long to match") from error
    except (regex.error, RecursionError) as error:
        raise ValueError(f"has the pattern {key!r}, no regular expression: {error}") from error


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    problems = unsupported(fields)
    start = fields.get("init_lora_weights", True)
    if not any(is_same(start, value) for value in _KEEP_BASE):
        problems.append(
            f"init_lora_weights={start!r} (its factors are relative to changed base weights; "
            "save it in PEFT with path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise ValueError(f"asks for what is not supported: {', '.join(problems)}")


def config_fields(adapter: AdapterData, own: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    The commonest rank and alpha are r and lora_alpha; other layers are in the patterns.
    """
    rank = Counter(x.rank for x in adapter.layers.values()).most_common(1)[0][0]
    common = Counter(x.alpha for x in adapter.layers.values() if x.rank == rank)
    alpha = common.most_common(1)[0][0]
    ranks = {path: x.rank for path, x in adapter.layers.items()}
    alphas = {path: whole(x.alpha) for path, x in adapter.layers.items()}
    return {
        **PLAIN_FIELDS,
        "alpha_pattern": exact_pattern(alphas, whole(alpha)),
        "base_model_name_or_path": adapter.base_model or None,
        "bias": adapter.bias,
        "inference_mode": True,
        "lora_alpha": whole(alpha),
        "lora_bias": adapter.branch_bias,
        "lora_dropout": adapter.dropout,
        "modules_to_save": list(adapter.modules) or None,
        "peft_type": OWN_TYPE if own else "LORA",
        "r": rank,
        "rank_pattern": exact_pattern(ranks, rank),
        "target_modules": target_modules(adapter.layers),
        "use_dora": adapter.use_dora,
        "use_rslora": False,
    }


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The pattern that gives each module its value: an entry for every one that differs from
    the default, and for those that one of these would catch."""
    differing = {module for module, value in values.items() if value != default}

    def caught(module: str) -> bool:
        levels = without_counts(module).split(".")
        return any(".".join(levels[i:]) in differing for i in range(len(levels)))

    # Longer paths first: a pattern means every path that ends in it.
    ordered = sorted(values, key=lambda module: (-len(module), module))
    return {re.escape(m): values[m] for m in ordered if m in differing or caught(m)}


def target_modules(paths: Iterable[str]) -> list[str] | str:
    """PEFT's target_modules for exactly these modules.

    PEFT takes a name in a list as the end of a path too. A name without a dot ("conv1") may
    well be the end of others, so then it is one regular expression for whole paths.
    """
    names = sorted(paths)
    if all("." in name for name in names):
        return names
    return "|".join(re.escape(name) for name in names)
