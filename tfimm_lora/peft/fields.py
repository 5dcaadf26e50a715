"""The fields of PEFT's LoraConfig and LoHaConfig: types, and which of them are supported."""

from __future__ import annotations

import math
from typing import Any

from tfimm_lora.validation import TRAIN_BIAS

#: The peft_type of files that only this package reads. PEFT refuses it by name.
OWN_TYPE = "TFIMM_LORA"

#: PEFT's name for "all". In PEFT it means linear layers only: in most image models that is the
#: classifier too, and no convolution.
ALL_LINEAR = "all-linear"

#: The layers_pattern for any level before the number of a block.
ANY_LEVEL = "[^.]+"

#: Fields of PEFT for unsupported features, each with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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

#: Fields that are supported, or that do not change what the adapter computes: they record how
#: it was trained, or are options of another field.
_KNOWN = frozenset(
    (
        *("peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config"),
        *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save"),
        *("use_dora", "lora_bias"),
        *("rank_pattern", "alpha_pattern", "init_lora_weights", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size"),
    )
)

#: The same of PEFT's LoHaConfig.
_KNOWN_OF_LOHA = frozenset(
    (
        *("peft_type", "peft_version", "auto_mapping", "task_type", "inference_mode"),
        *("base_model_name_or_path", "revision", "r", "alpha", "modules_to_save"),
        *("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
        *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern"),
    )
)
#: What this package's extension of it has, too.
_OWN_OF_LOHA = frozenset(("use_loha", "bias"))

#: Fields that are the same in every written config of LoHa.
PLAIN_LOHA_FIELDS: dict[str, Any] = {
    "init_weights": True,
    "module_dropout": 0.0,
    "rank_dropout": 0.0,
    "task_type": None,
    "use_effective_conv2d": False,
}

#: Fields that are the same in every written config of LoRA.
PLAIN_FIELDS: dict[str, Any] = {
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "task_type": None,
}


class PeftFields:
    """The checked fields of a LoraConfig or a LoHaConfig.

    Args:
        fields: The content of adapter_config.json.

    Raises:
        ValueError: If a field has a wrong type or is out of range. The message is the end of a
            sentence, for the caller to complete: "has r=0, expected ...".
    """

    def __init__(self, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}, expected an object")
        self._fields = fields
        if fields.get("peft_type") not in ("LORA", "LOHA", OWN_TYPE):
            raise ValueError(
                f"has peft_type={fields.get('peft_type')!r}, expected 'LORA' or 'LOHA'"
            )
        own_loha = fields["peft_type"] == OWN_TYPE and self._get("use_loha", bool, False)
        self.use_loha: bool = fields["peft_type"] == "LOHA" or own_loha
        self.rank: int = self._get("r", int, 8)
        self._alpha_name = "alpha" if self.use_loha else "lora_alpha"
        self.alpha: float = self._number(self._alpha_name, 8)
        #: Dropouts of PEFT's LoHa, in training, that there are not here.
        self.other_dropouts = {
            name: rate
            for name in ("rank_dropout", "module_dropout")
            if self.use_loha and (rate := self._number(name, 0.0))
        }
        self.use_rslora: bool = self._get("use_rslora", bool, False)
        self.use_dora: bool = self._get("use_dora", bool, False)
        self.lora_bias: bool = self._get("lora_bias", bool, False)
        self.dropout: float = self._number("lora_dropout", 0.0)
        self.bias: str = self._get("bias", str, "none")
        self.base_model: str = self._get("base_model_name_or_path", str, "")
        self.modules: tuple[str, ...] = tuple(self._get("modules_to_save", list, []))
        self.rank_pattern: dict[str, int] = self._get("rank_pattern", dict, {})
        self.alpha_pattern: dict[str, float] = self._get("alpha_pattern", dict, {})
        self._check()

    def _check(self) -> None:
        if self.bias not in TRAIN_BIAS:
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
                f"has r={self.rank!r}, {self._alpha_name}={self.alpha!r}, lora_dropout="
                f"{self.dropout!r}, expected a positive rank, a finite alpha and a rate "
                "in [0, 1)"
            )

    def _get(self, name: str, kind: type, default: Any) -> Any:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"has {name}={value!r}, expected a value of type {kind.__name__}")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"has {name}={value!r}, expected a number")
        return _float(name, value)


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"has a number in {name} that is too large for a float") from error


def unsupported(fields: dict[str, Any], is_loha: bool = False) -> list[str]:
    """Return the fields with unsupported values, as "name=value".

    Args:
        fields: The content of adapter_config.json.
        is_loha: Whether they are those of a LoHaConfig.
    """
    known_fields = _KNOWN_OF_LOHA if is_loha else _KNOWN
    if fields.get("peft_type") == OWN_TYPE:
        known_fields = known_fields | _OWN_OF_LOHA
    problems = [
        f"{name}={fields[name]!r}"
        for name, unused in _UNSUPPORTED.items()
        if name in fields and not any(is_same(fields[name], value) for value in unused)
    ]
    for name, value in fields.items():
        known = name in known_fields or name in _UNSUPPORTED
        if not known and value not in (None, False, [], {}, ""):
            problems.append(f"{name}={value!r} (unknown)")
    return problems


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of the same type: True is not 1."""
    return type(value) is type(other) and value == other


def whole(value: float) -> float | int:
    """Return a number as PEFT writes it, whole numbers as integers."""
    return int(value) if float(value).is_integer() else value
