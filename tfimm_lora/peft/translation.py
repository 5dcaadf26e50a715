"""Translate the fields of PEFT's LoraConfig to those of ``LoRAConfig``, and back.

Layers are named by paths with "/" here, and by module names with dots in PEFT. Regular
expressions may use either.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfimm_lora.peft.fields import (
    ALL_LINEAR,
    ANY_LEVEL,
    PLAIN_FIELDS,
    PLAIN_LOHA_FIELDS,
    PeftFields,
    unsupported,
    whole,
)

#: The layers_pattern that corresponds to none in PEFT: a number below the second level.
#: The end keeps it from matching the end of a name, as a pattern for Keras' names may.
_PEFT_ANY_LEVEL = r"[^.]+\.[^.]*(?=\.)"

#: The prefixes of the initializations that have the same name here as in PEFT.
_INITIALIZATIONS = ("gaussian", "pissa", "olora", "orthogonal", "eva")


# -- from PEFT -----------------------------------------------------------------------------


def read_fields(source: Any) -> dict[str, Any]:
    """Read the fields of a PEFT config.

    Args:
        source: A dictionary, a LoraConfig, or the path of an adapter_config.json or its folder.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        path = path / "adapter_config.json" if path.is_dir() else path
        try:
            fields: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} does not exist; expected PEFT's adapter_config.json or its folder."
            ) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        return fields
    given = source.to_dict() if hasattr(source, "to_dict") else source
    if not isinstance(given, Mapping):
        raise TypeError(
            f"Received {source!r}; expected a PEFT LoraConfig, a dictionary of its fields, or "
            "the path of an adapter_config.json."
        )
    return {"peft_type": "LORA", **{name: _listed(value) for name, value in given.items()}}


def _listed(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def arguments_from(fields: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of a PEFT config to those of ``LoRAConfig``.

    Raises:
        ValueError: As ``PeftFields``; also if fields have no counterpart, which the message
            names.
    """
    peft = PeftFields(fields)
    if peft.use_loha:
        init, problem = "default", _loha_problems(fields, peft)
    else:
        init, problem = _init_from(fields.get("init_lora_weights", True))
    problems = unsupported(fields, peft.use_loha) + problem
    if fields.get("ensure_weight_tying"):
        problems.append("ensure_weight_tying=True")
    patterns, layers = _layers_patterns(fields), fields.get("layers_to_transform")
    problems += [
        f"layers_pattern={p!r} (PEFT applies the | to its whole expression)"
        for p in patterns
        if _is_bare_alternative(p)
    ]
    if problems:
        raise ValueError(f"uses unsupported features: {', '.join(problems)}")
    if layers == []:
        layers, patterns = None, []
    elif layers is not None and not patterns:
        patterns = [_PEFT_ANY_LEVEL]
    return {
        "lora_rank": peft.rank,
        "lora_alpha": peft.alpha,
        "lora_use_rslora": peft.use_rslora,
        "lora_rank_pattern": dict(peft.rank_pattern),
        "lora_alpha_pattern": dict(peft.alpha_pattern),
        "lora_dropout": peft.dropout,
        "lora_use_dora": peft.use_dora,
        "lora_use_loha": peft.use_loha,
        "lora_bias": peft.lora_bias,
        "lora_init": init,
        "lora_targets": _names_from(fields, "target_modules"),
        "lora_exclude": _names_from(fields, "exclude_modules"),
        "lora_layers": layers,
        "lora_layers_pattern": None if patterns == [ANY_LEVEL] else patterns,
        "lora_train_modules": tuple(name.replace(".", "/") for name in peft.modules),
        "lora_train_bias": peft.bias,
    }


def _layers_patterns(fields: dict[str, Any]) -> list[str]:
    """Return layers_pattern as a list.

    Raises:
        ValueError: As ``arguments_from``.
    """
    layers, pattern = fields.get("layers_to_transform"), fields.get("layers_pattern")
    patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"has layers_pattern={pattern!r}, expected names of levels")
    if layers is not None and isinstance(fields.get("target_modules"), str):
        raise ValueError(
            f"has layers_to_transform={layers!r} with target_modules="
            f"{fields['target_modules']!r}, expected a list of names"
        )
    return patterns


def with_grouped_patterns(fields: dict[str, Any]) -> dict[str, Any]:
    """Put every layers_pattern that PEFT would split at a "|" in parentheses.

    ``arguments_from`` refuses such a pattern, whose meaning in PEFT it cannot express. This is
    for callers that choose the layers by ``PeftSelection``.
    """
    given = fields.get("layers_pattern")
    patterns = [given] if isinstance(given, str) else given
    if not patterns or not isinstance(patterns, list):
        return fields
    grouped = [f"(?:{p})" if _is_bare_alternative(str(p)) else p for p in patterns]
    return {**fields, "layers_pattern": grouped}


def _names_from(fields: dict[str, Any], name: str) -> str | list[str] | None:
    given = fields.get(name)
    if name == "target_modules" and given in ("", []):
        raise ValueError(
            f"has target_modules={given!r}, which selects no module, expected names"
        )
    if given is None or isinstance(given, str):
        return given or None
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        raise ValueError(f"has {name}={given!r}, expected names or a regular expression")
    return [x.replace(".", "/") for x in given] or None


def _is_bare_alternative(pattern: str) -> bool:
    return "|" in pattern and not (pattern.startswith("(") and pattern.endswith(")"))


def _init_from(value: Any) -> tuple[str, list[str]]:
    """Return the ``lora_init`` for a value of init_lora_weights, and the problem if none."""
    if value is True or value is None:
        return "default", []
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_INITIALIZATIONS):
        return name, []
    why = "B would not be initialized to zero" if value is False else "not supported here"
    return "default", [f"init_lora_weights={value!r} ({why})"]


def _loha_problems(fields: dict[str, Any], peft: PeftFields) -> list[str]:
    """Return the settings of a LoHaConfig that have no counterpart here."""
    found = [f"{name}={rate!r}" for name, rate in peft.other_dropouts.items()]
    if fields.get("use_effective_conv2d"):
        found.append("use_effective_conv2d=True (the third factor is not trained here)")
    if fields.get("init_weights") is False:
        found.append("init_weights=False (B would not be initialized to zero)")
    return found


# -- to PEFT -------------------------------------------------------------------------------


def fields_from(values: Mapping[str, Any], presets: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of a ``LoRAConfig`` to those of PEFT's LoraConfig or LoHaConfig.

    Args:
        values: The fields of a ``LoRAConfig``.
        presets: Preset name -> targets, of its class.

    Raises:
        ValueError: If PEFT cannot express a field; the message names all of them.
    """
    problems: list[str] = []
    rank, alpha, pattern = _scales_to(values, problems)
    targets = _names_to(values, "lora_targets", presets, problems)
    exclude = _names_to(values, "lora_exclude", presets, problems)
    if values["lora_layers"] is not None and isinstance(targets, str):
        problems.append(
            "lora_layers (with lora_targets as a regular expression; PEFT needs a list)"
        )
    for name, value in values.items():
        if name not in _TRANSLATED and value not in (None, False):
            why = _WITHOUT_COUNTERPART.get(name, "PEFT has no such field")
            problems.append(f"{name}={value!r} ({why})")
    if values["lora_initializer"] is not None:
        problems.append(f"lora_initializer={values['lora_initializer']!r} (see lora_init)")
    if values["lora_use_loha"] and values["lora_train_bias"] != "none":
        problems.append(
            f"lora_train_bias={values['lora_train_bias']!r} (PEFT's LoHa trains no biases)"
        )
    if values["lora_use_loha"] and values["lora_use_rslora"]:
        problems.append("lora_use_rslora=True (PEFT's LoHa has alpha / rank only)")
    if problems:
        raise ValueError(f"uses features that PEFT cannot express: {', '.join(problems)}")
    layers, patterns = values["lora_layers"], values["lora_layers_pattern"]
    if layers is not None:
        patterns = [
            f"(?:{p})" if _is_bare_alternative(p) else p for p in patterns or (ANY_LEVEL,)
        ]
    shared = {
        "alpha_pattern": pattern,
        "exclude_modules": exclude,
        "layers_pattern": None if patterns in (None, [_PEFT_ANY_LEVEL]) else patterns,
        "layers_to_transform": None if layers is None else list(layers),
        "modules_to_save": [_dotted(n).strip(".") for n in values["lora_train_modules"]]
        or None,
        "r": rank,
        "rank_pattern": {_dotted(k): v for k, v in values["lora_rank_pattern"].items()},
        "target_modules": targets,
    }
    if values["lora_use_loha"]:
        return {**PLAIN_LOHA_FIELDS, **shared, "alpha": alpha, "peft_type": "LOHA"}
    return {
        **PLAIN_FIELDS,
        **shared,
        "bias": values["lora_train_bias"],
        "init_lora_weights": True if values["lora_init"] == "default" else values["lora_init"],
        "lora_alpha": alpha,
        "lora_bias": values["lora_bias"],
        "lora_dropout": values["lora_dropout"],
        "peft_type": "LORA",
        "use_dora": values["lora_use_dora"],
        "use_rslora": values["lora_use_rslora"],
    }


#: Fields of ``LoRAConfig`` that ``fields_from`` translates.
_TRANSLATED = frozenset(
    f"lora_{name}"
    for name in (
        *("alpha", "alpha_pattern", "bias", "dropout", "exclude", "init", "initializer"),
        *("layers", "layers_pattern", "rank", "rank_pattern", "targets", "train_bias"),
        *("train_modules", "use_dora", "use_loha", "use_rslora"),
    )
)

#: Fields of ``LoRAConfig`` that PEFT does not have, and the alternative.
_WITHOUT_COUNTERPART = {
    "lora_freeze_a": "PEFT has an optimizer for it, create_lorafa_optimizer",
    "lora_qkv": "PEFT adapts the whole fused kernel; save_adapter writes its blocks exactly",
    "lora_regularizer": "PEFT has no regularizers",
    "lora_train_classifier": "name the classifier in lora_train_modules",
}


def _scales_to(
    values: Mapping[str, Any], problems: list[str]
) -> tuple[int, float, dict[str, Any]]:
    """Return r, lora_alpha and alpha_pattern. An alpha of None is a scale of 1 at any rank."""

    def alpha_for_one(rank: int) -> float:
        return whole(math.sqrt(rank) if values["lora_use_rslora"] else rank)

    rank, alpha = values["lora_rank"], values["lora_alpha"]
    ranks, alphas = values["lora_rank_pattern"], values["lora_alpha_pattern"]
    pattern = {}
    for key, value in alphas.items():
        if value is None and ranks:
            problems.append(
                f"lora_alpha_pattern[{key!r}]=None (with lora_rank_pattern; pass the number)"
            )
        pattern[_dotted(key)] = alpha_for_one(rank) if value is None else whole(value)
    if alpha is None:
        for key, value in ranks.items():
            pattern.setdefault(_dotted(key), alpha_for_one(value))
    return rank, alpha_for_one(rank) if alpha is None else whole(alpha), pattern


def _names_to(
    values: Mapping[str, Any], name: str, presets: Mapping[str, Any], problems: list[str]
) -> str | list[str] | None:
    given = values[name]
    if given is None and name == "lora_exclude":
        return None
    if isinstance(given, str) and given.lower() == ALL_LINEAR:
        return ALL_LINEAR
    targets = given
    if given is None or (isinstance(given, str) and given in presets):
        targets = presets["default" if given is None else given]
        if targets is None or isinstance(targets, str):
            problems.append(
                f"{name}={given!r} (its layers depend on the model; pass the list "
                "explain_targets(model, ...).adapted)"
            )
            return None
    if isinstance(targets, str):
        return re.sub(r"\\?/", r"\\.", targets)
    problems += [
        f"{name} with {x!r} (PEFT's modules have unique names)" for x in targets if "#" in x
    ]
    return [_dotted(x).strip(".") for x in targets]


def _dotted(path: str) -> str:
    return path.replace("/", ".")
