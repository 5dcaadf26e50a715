"""adapter_config.json: what PEFT's LoraConfig says, and what of it is understood here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.config import scale

#: peft_type of files that only this package reads; PEFT refuses it by name.
OWN_TYPE = "TFIMM_LORA"

#: Fields of PEFT that change what an adapter computes in ways that are not supported, each
#: with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, [], {}),
    "target_parameters": (None, [], {}),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "kasa_config": (None, {}),
    "megatron_config": (None, {}),
}

#: Longer expressions take long to compile alone.
_LONGEST_PATTERN = 1000

#: Initialisers after which the base weights are those of the checkpoint.
_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")

#: Fields that say nothing about what the adapter computes: how it was trained or made, which
#: layers were chosen (the tensors tell), or what only training needs.
_HARMLESS = frozenset(
    (
        *("peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config"),
        *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save"),
        *("rank_pattern", "alpha_pattern", "init_lora_weights", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size"),
    )
)


class PeftConfig:
    """The fields of an adapter_config.json, checked.

    Args:
        fields: The parsed file.

    Raises:
        ValueError: for a field of a wrong type, or for one that is not supported; all of
            them are named.
    """

    def __init__(self, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}, expected an object")
        self._fields = fields
        self.own = fields.get("peft_type") == OWN_TYPE
        if fields.get("peft_type") not in ("LORA", OWN_TYPE):
            raise ValueError(f"has peft_type={fields.get('peft_type')!r}, expected 'LORA'")
        _refuse_unsupported(fields)
        self.rank: int = self._get("r", int, 8)
        self.alpha: float = self._number("lora_alpha", 8)
        self.use_rslora: bool = self._get("use_rslora", bool, False)
        self.dropout: float = self._number("lora_dropout", 0.0)
        self.bias: str = self._get("bias", str, "none")
        self.base_model: str = self._get("base_model_name_or_path", str, "")
        self.modules: tuple[str, ...] = tuple(self._get("modules_to_save", list, []))
        self.rank_pattern: dict[str, int] = self._get("rank_pattern", dict, {})
        self.alpha_pattern: dict[str, float] = self._get("alpha_pattern", dict, {})
        self._check()

    def _check(self) -> None:
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"has bias={self.bias!r}, expected none, lora_only or all")
        if not all(isinstance(name, str) for name in self.modules):
            raise ValueError(f"has modules_to_save={list(self.modules)!r}, expected names")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in getattr(self, name).items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not math.isfinite(_float(name, value)):
                    raise ValueError(f"has {name}[{key!r}]={value!r}, expected a number")
        if self.rank < 1 or not 0 <= self.dropout < 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"has r={self.rank!r}, lora_alpha={self.alpha!r}, lora_dropout="
                f"{self.dropout!r}, expected a positive rank, a finite alpha and a rate "
                "in [0, 1)"
            )

    def _get(self, name: str, kind: type, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"has {name}={value!r}, expected a value of {kind.__name__}")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"has {name}={value!r}, expected a number")
        return _float(name, value)

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


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"has a number in {name} that is too large") from error


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
    problems = [
        f"{name}={fields[name]!r}"
        for name, unused in _UNSUPPORTED.items()
        if name in fields and not any(_is(fields[name], value) for value in unused)
    ]
    start = fields.get("init_lora_weights", True)
    if not any(_is(start, value) for value in _KEEP_BASE):
        problems.append(
            f"init_lora_weights={start!r} (its factors are relative to changed base weights; "
            "save it in PEFT with path_initial_model_for_weight_conversion)"
        )
    for name, value in fields.items():
        known = name in _HARMLESS or name in _UNSUPPORTED
        if not known and value not in (None, False, [], {}, ""):
            problems.append(f"{name}={value!r} (unknown)")
    if problems:
        raise ValueError(f"asks for what is not supported: {', '.join(problems)}")


def _is(value: Any, other: Any) -> bool:
    """Equality that tells True from 1."""
    return type(value) is type(other) and value == other


def config_fields(adapter: Adapter, own: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    The commonest rank and alpha are r and lora_alpha; other layers are in the patterns.
    """
    rank = Counter(x.rank for x in adapter.layers.values()).most_common(1)[0][0]
    common = Counter(x.alpha for x in adapter.layers.values() if x.rank == rank)
    alpha = common.most_common(1)[0][0]
    # Longer paths first: a pattern means every path that ends in it.
    ordered = sorted(adapter.layers.items(), key=lambda item: (-len(item[0]), item[0]))
    ranks = {re.escape(path): x.rank for path, x in ordered}
    alphas = {re.escape(path): _whole(x.alpha) for path, x in ordered}
    return {
        "alpha_pattern": _exceptions(alphas, _whole(alpha)),
        "base_model_name_or_path": adapter.base_model or None,
        "bias": adapter.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": list(adapter.modules) or None,
        "peft_type": OWN_TYPE if own else "LORA",
        "r": rank,
        "rank_pattern": _exceptions(ranks, rank),
        "target_modules": target_modules(adapter.layers),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _exceptions(pattern: dict[str, Any], default: Any) -> dict[str, Any]:
    """The entries that differ from the default, and those that one of these would catch."""
    differing = {key for key, value in pattern.items() if value != default}
    caught = {
        key
        for key in pattern
        if any(key != other and key.endswith("\\." + other) for other in differing)
    }
    return {key: pattern[key] for key in pattern if key in differing | caught}


def target_modules(paths: Iterable[str]) -> list[str] | str:
    """PEFT's target_modules for exactly these modules.

    PEFT takes a name in a list as the end of a path too. A name without a dot ("conv1") may
    well be the end of others, so then it is one regular expression for whole paths.
    """
    names = sorted(paths)
    if all("." in name for name in names):
        return names
    return "|".join(re.escape(name) for name in names)


def _whole(value: float) -> float | int:
    """A number as PEFT writes it: whole ones as integers."""
    return int(value) if float(value).is_integer() else value
