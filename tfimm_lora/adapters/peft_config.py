"""adapter_config.json: read and write PEFT's LoraConfig or LoHaConfig of an adapter."""

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
    PLAIN_LOHA_FIELDS,
    PeftFields,
    is_same,
    unsupported,
    whole,
)
from tfimm_lora.peft.matching import PeftSelection
from tfimm_lora.utils.optional_imports import require

#: Longer regular expressions take too long to compile.
_MAX_PATTERN = 1000

#: The seconds after which matching of an untrusted pattern is stopped.
_MATCH_SECONDS = 0.5

#: Values of init_lora_weights with which PEFT does not change the base weights.
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")


class PeftConfig(PeftFields):
    """The checked fields of an adapter_config.json.

    Args:
        fields: The parsed file.

    Attributes:
        own: Whether it is this package's extension of the format.
        selection: The modules that the config selects.
        names_are_exact: Whether this package wrote the names, as full paths, and nobody edited
            them since. In PEFT a name in modules_to_save is the end of any number of paths.

    Raises:
        ValueError: If a field has a wrong type or is not supported; the message names all
            unsupported fields.
    """

    def __init__(self, fields: Any) -> None:
        super().__init__(fields)
        self.own = fields["peft_type"] == OWN_TYPE
        self.names_are_exact = False
        self.selection = PeftSelection.of(_checked_names(fields), _match_untrusted)
        _refuse_unsupported(self, fields)

    def scale_of(self, module: str, rank: int) -> float:
        """Return the scale of a module.

        Args:
            module: The module path.
            rank: The rank of its tensors.

        Raises:
            ValueError: If the config has another rank for the module.
        """
        expected = value_by_pattern(module, self.rank_pattern, self.rank)
        if expected != rank:
            raise ValueError(f"has the rank {expected} for {module}, its tensors have {rank}")
        alpha = value_by_pattern(module, self.alpha_pattern, self.alpha)
        return scale(rank, alpha, self.use_rslora)


def value_by_pattern(module: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first key that matches the end of a module path, as in PEFT."""
    for key, value in pattern.items():
        if _ends_with(module, key):
            return value
    return default


def _ends_with(module: str, key: str) -> bool:
    literal = re.sub(r"\\(.)", r"\1", key)
    if re.escape(literal) == key or re.fullmatch(r"[\w.]*", key):
        return _ends_with_name(module, literal, any_dot="\\" not in key)
    return _matches_untrusted(module, key)


def _ends_with_name(module: str, name: str, any_dot: bool) -> bool:
    """Whether a module path ends in a name, from a level on.

    With ``any_dot`` a "." in the name matches any character: in PEFT an unescaped name is a
    regular expression too.
    """
    tail = module[-len(name) :] if name else ""
    same = len(tail) == len(name) and all(
        a == b or (b == "." and any_dot) for a, b in zip(tail, name)
    )
    before = module[: -len(name)] if name else module
    return same and (not before or before.endswith("."))


def _matches_untrusted(module: str, pattern: str) -> bool:
    return _match_untrusted(rf"(.*\.)?({pattern})$", module, False) is not None


def _match_untrusted(pattern: str, text: str, whole: bool) -> Any:
    """Match an untrusted pattern, with a timeout, which the standard library lacks."""
    regex: Any = require("regex", extra="weights", why="A regular expression in an adapter")
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"has a pattern of {len(pattern)} characters ({pattern[:40]!r}...)")
    function = regex.fullmatch if whole else regex.match
    try:
        return function(pattern, text, timeout=_MATCH_SECONDS)
    except TimeoutError as error:
        raise ValueError(
            f"has the pattern {pattern!r}, which takes too long to match"
        ) from error
    except (regex.error, RecursionError) as error:
        raise ValueError(
            f"has the pattern {pattern!r}, which is not a regular expression: {error}"
        ) from error


def _checked_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that select modules, after a check of their types."""
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    for name in names:
        given = fields.get(name)
        listed = isinstance(given, list) and all(isinstance(x, str) for x in given)
        if not (given is None or isinstance(given, str) or listed):
            raise ValueError(f"has {name}={given!r}, expected names")
    blocks = fields.get("layers_to_transform")
    for number in blocks if isinstance(blocks, list) else [blocks]:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise ValueError(f"has layers_to_transform={blocks!r}, expected whole numbers")
    return {name: fields.get(name) for name in (*names, "layers_to_transform")}


def _refuse_unsupported(config: PeftFields, fields: dict[str, Any]) -> None:
    problems = unsupported(fields, config.use_loha)
    initialization = fields.get("init_lora_weights", True)
    if not any(is_same(initialization, value) for value in _BASE_UNCHANGED):
        problems.append(
            f"init_lora_weights={initialization!r} (its factors are relative to changed base "
            "weights; save it in PEFT with path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise ValueError(f"uses unsupported features: {', '.join(problems)}")


def config_fields(adapter: AdapterData, own: bool) -> dict[str, Any]:
    """Return the content of an adapter's adapter_config.json.

    The most common rank and alpha are r and lora_alpha. The others are in the patterns.

    Args:
        adapter: The adapter.
        own: Whether to write this package's peft_type, which PEFT refuses.
    """
    rank = Counter(x.rank for x in adapter.layers.values()).most_common(1)[0][0]
    common = Counter(x.alpha for x in adapter.layers.values() if x.rank == rank)
    alpha = common.most_common(1)[0][0]
    ranks = {path: x.rank for path, x in adapter.layers.items()}
    alphas = {path: whole(x.alpha) for path, x in adapter.layers.items()}
    shared = {
        "alpha_pattern": exact_pattern(alphas, whole(alpha)),
        "base_model_name_or_path": adapter.base_model or None,
        "inference_mode": True,
        "modules_to_save": list(adapter.modules) or None,
        "peft_type": OWN_TYPE if own else "LOHA" if adapter.use_loha else "LORA",
        "r": rank,
        "rank_pattern": exact_pattern(ranks, rank),
        "target_modules": target_modules(adapter.layers),
    }
    if adapter.use_loha:
        # PEFT's LoHa has no fields for the biases.
        own_fields = {"bias": adapter.bias, "use_loha": True} if own else {}
        fields = {**shared, **own_fields, "alpha": whole(alpha)}
        return {**PLAIN_LOHA_FIELDS, **dict(sorted(fields.items()))}
    fields = {
        **shared,
        "bias": adapter.bias,
        "lora_alpha": whole(alpha),
        "lora_bias": adapter.branch_bias,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.use_dora,
        "use_rslora": False,
    }
    return {**PLAIN_FIELDS, **dict(sorted(fields.items()))}


def exact_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return a rank_pattern or alpha_pattern with which every module has its value.

    It has an entry for every module whose value is not the default, and for every module that
    one of these entries would match too.

    Args:
        values: Module path -> value.
        default: The value without an entry.
    """
    differing = {module for module, value in values.items() if value != default}

    def matched(module: str) -> bool:
        levels = without_counts(module).split(".")
        return any(".".join(levels[i:]) in differing for i in range(len(levels)))

    # Longer paths first, since a pattern matches every path that ends in it.
    ordered = sorted(values, key=lambda module: (-len(module), module))
    return {re.escape(m): values[m] for m in ordered if m in differing or matched(m)}


def target_modules(paths: Iterable[str]) -> list[str] | str:
    """Return PEFT's target_modules for exactly these modules.

    In PEFT a name in a list also matches the end of a path. A name without a dot ("conv1") may
    match others, so if there is one, the result is one regular expression for whole paths.
    """
    names = sorted(paths)
    if all("." in name for name in names):
        return names
    return "|".join(re.escape(name) for name in names)
