"""Checks of arguments, with error messages that name the argument."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tfimm_lora.utils.suggestions import did_you_mean

#: Values of ``train_bias``: no bias, those of adapted layers, every one in the model.
TRAIN_BIAS = ("none", "lora_only", "all")


def check_rank(rank: Any, name: str = "lora_rank") -> None:
    """Raise unless ``rank`` is a positive integer."""
    whole = isinstance(rank, numbers.Integral) and not isinstance(rank, bool)
    if not whole or rank < 1:
        raise (ValueError if whole else TypeError)(
            f"Received {name}={rank!r}; expected a positive integer. Pass for example "
            "lora_rank=4, or leave the layer out of lora_targets."
        )


def check_alpha(alpha: Any, name: str = "lora_alpha") -> None:
    """Raise unless ``alpha`` is None or a finite number."""
    if alpha is None:
        return
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(
            f"Received {name}={alpha!r}; expected a number, or None for a scale of 1."
        )
    if not math.isfinite(alpha):
        raise ValueError(f"Received {name}={alpha!r}; expected a finite number.")


def check_bool(value: Any, field: str) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"Received {field}={value!r}; expected True or False.")


def check_pattern(pattern: Any, name: str, check: Callable[[Any, str], None]) -> None:
    """Raise unless ``pattern`` maps regular expressions to values that ``check`` accepts."""
    if not isinstance(pattern, Mapping) or not all(isinstance(k, str) for k in pattern):
        raise TypeError(
            f"Received {name}={pattern!r}; expected a dictionary from names of layers to "
            "values."
        )
    for key, value in pattern.items():
        try:
            re.compile(rf"(.*\.)?({key})")
        except re.error as error:
            raise ValueError(
                f"Received {name} with the key {key!r}, which is not a regular "
                f"expression: {error}."
            ) from error
        check(value, f"{name}[{key!r}]")


def check_dropout(rate: Any, name: str = "lora_dropout") -> None:
    """Raise unless ``rate`` is a number in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"Received {name}={rate!r}; expected a rate in [0, 1).")
    if not 0 <= float(rate) < 1:
        raise ValueError(f"Received {name}={rate!r}; expected a rate in [0, 1).")


def check_train_bias(train_bias: Any, name: str = "train_bias") -> None:
    """Raise unless ``train_bias`` is one of ``TRAIN_BIAS``."""
    check_choice(train_bias, name, TRAIN_BIAS)


def check_targets(targets: Any, field: str = "lora_targets") -> None:
    """Raise unless ``targets`` is None, a string or a list of strings."""
    if targets is None or isinstance(targets, str):
        return
    if not isinstance(targets, Iterable) or not all(isinstance(t, str) for t in targets):
        raise TypeError(
            f"Received {field}={targets!r}; expected a list of layer names, the name "
            "of a preset or a regular expression as a string, or None for the default."
        )


def listed(values: Any, field: str) -> list[Any]:
    """Return the items of an iterable as a list."""
    try:
        return list(values)
    except TypeError as error:
        raise TypeError(f"Received {field}={values!r}; expected a list of names.") from error


def check_names(names: Any, field: str) -> None:
    """Raise unless ``names`` is a list of strings."""
    is_list = isinstance(names, Iterable) and not isinstance(names, str)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise TypeError(f"Received {field}={names!r}; expected a list of layer names.")


def indices_of(layers: Any) -> tuple[int, ...] | None:
    """Return ``lora_layers`` as a tuple of numbers, or None for every layer.

    Raises:
        TypeError, ValueError: Unless it is None, a non-negative integer, or a non-empty list
            of them.
    """
    if layers is None:
        return None
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in given):
        raise TypeError(
            f"Received lora_layers={layers!r}; expected an integer or a list of integers, "
            "the numbers of the blocks to adapt, or None for all."
        )
    if not given or min(given) < 0:
        raise ValueError(
            f"Received lora_layers={layers!r}; expected at least one number, and no negative "
            "ones, for example [10, 11], or None for all blocks."
        )
    return tuple(int(i) for i in given)


def patterns_of(pattern: Any, layers: Any) -> tuple[str, ...] | None:
    """Return ``lora_layers_pattern`` as a tuple of regular expressions, or None.

    Raises:
        TypeError, ValueError: If it is anything else, or if ``lora_layers`` is None.
    """
    if pattern is None or pattern in ("", [], ()):
        return None
    given = [pattern] if isinstance(pattern, str) else listed(pattern, "lora_layers_pattern")
    check_names(given, "lora_layers_pattern")
    if layers is None:
        raise ValueError(
            f"Received lora_layers_pattern={pattern!r} without lora_layers; expected both: "
            "the pattern selects the numbers in a path that lora_layers refers to."
        )
    for one in given:
        try:
            re.compile(f"(?:{one})")
        except re.error as error:
            raise ValueError(
                f"Received lora_layers_pattern={pattern!r}, in which {one!r} is not a regular "
                f"expression: {error}. Pass the name of the level before the number, for "
                'example "blocks".'
            ) from error
    return tuple(given)


def check_qkv(blocks: Any, name: str = "lora_qkv") -> None:
    """Raise unless ``blocks`` is None or consists of different letters of "qkv"."""
    if blocks is None:
        return
    if not isinstance(blocks, str):
        raise TypeError(f'Received {name}={blocks!r}; expected letters of "qkv", or None.')
    if not blocks or set(blocks) - set("qkv") or len(set(blocks)) < len(blocks):
        raise ValueError(
            f'Received {name}={blocks!r}; expected letters of "qkv", each at most once, '
            'for example "qv".'
        )


def check_qkv_layout(layout: Any, name: str = "lora_qkv_layout") -> None:
    """Raise unless ``layout`` consists of at least two different letters of "qkv"."""
    letters = isinstance(layout, str) and set(layout) <= set("qkv")
    if not letters or len(layout) < 2 or len(set(layout)) < len(layout):
        raise ValueError(
            f'Received {name}={layout!r}; expected at least two letters of "qkv", each once, '
            "in the order of the blocks in the kernel."
        )


def check_keywords(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a TypeError that names the nearest known keyword for each unknown one."""
    known = list(known)
    problems = [f"{name}{did_you_mean(name, known)}" for name in given if name not in known]
    if problems:
        listed = ", ".join(problems)
        raise TypeError(
            f"Received unknown keywords for {what}: {listed}{'' if listed[-1] == '?' else '.'} "
            f"Known keywords: {', '.join(known)}."
        )


def check_integer(value: Any, field: str, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"Received {field}={value!r}; expected an integer of at least {least}.")
    if value < least:
        raise ValueError(
            f"Received {field}={value!r}; expected an integer of at least {least}."
        )


def check_number(
    value: Any,
    field: str,
    least: float = -math.inf,
    *,
    exclusive: bool = False,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise unless ``value`` is a finite number in the given range.

    Args:
        value: The value to check.
        field: Its name, for the error message.
        least: The smallest allowed number.
        exclusive: Whether ``least`` itself is not allowed.
        below: Numbers must be smaller than this one.
        most: The largest allowed number.
    """
    limits = (
        ("above" if exclusive else "of at least", least),
        ("below", below),
        ("at most", most),
    )
    listed = " and ".join(f"{word} {x:g}" for word, x in limits if math.isfinite(x))
    expected = f"a number {listed}" if listed else "a finite number"
    message = f"Received {field}={value!r}; expected {expected}."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(message)
    number = float(value)
    above_least = number > least if exclusive else number >= least
    in_range = above_least and number < below and number <= most
    if not (math.isfinite(number) and in_range):
        raise ValueError(message)


def check_choice(value: Any, field: str, choices: Iterable[Any]) -> None:
    """Raise unless ``value`` is one of ``choices``; suggest the most similar one."""
    known = list(choices)
    if value not in known:
        names = [str(choice) for choice in known]
        raise ValueError(
            f"Received {field}={value!r}; expected one of {', '.join(names)}"
            f"{did_you_mean(value, names) or '.'}"
        )


def check_batches(value: Any, name: str) -> None:
    """Raise unless a value may be batches: an array, or a collection of arrays, is none.

    Raises:
        TypeError: For a NumPy array, or a tuple, list or dict of arrays or tensors.
    """
    inside = [value]
    if isinstance(value, (tuple, list, dict)):
        inside = list(value.values() if isinstance(value, dict) else value)
    if any(hasattr(x, "shape") for x in inside):
        raise TypeError(
            f"Received {name} as arrays ({type(value).__name__}); expected batches, such as a "
            "tf.data.Dataset, a keras.utils.PyDataset or PictureBatches. For arrays: "
            "tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(32)."
        )
