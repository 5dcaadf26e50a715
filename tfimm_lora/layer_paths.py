"""Match layer paths with targets, like PEFT's target_modules.

A path joins the names of the layers below the model with "/": ``stages/0/blocks/2/mlp/fc1``.
Patterns may use "." instead of "/", as in torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfimm_lora.config import Presets, Targets
from tfimm_lora.peft.fields import ALL_LINEAR, ANY_LEVEL


def matches(path: str, targets: str | Iterable[str]) -> bool:
    """Whether a path matches ``targets``.

    A string is a regular expression for the full path. In a list each entry is a full path or
    the end of one, beginning after a separator: "fc1" matches ``mlp/fc1`` and not
    ``mlp/xfc1``. An entry that begins with a separator is a full path: "/fc1" matches only
    ``fc1``.

    Example:
        >>> matches("blocks/3/mlp/fc1", ["mlp.fc1"]), matches("blocks/3/mlp/fc1", "fc1")
        (True, False)
    """
    if isinstance(targets, str):
        plain = without_counts(path)
        forms = (path, plain, plain.replace("/", "."))
        return any(re.fullmatch(targets, form) is not None for form in forms)
    return any(is_suffix(path, name) for name in targets)


def without_counts(path: str) -> str:
    """Return a path without the suffix "#2" that distinguishes layers of the same path."""
    return re.sub(r"#\d+(?=[/.]|$)", "", path)


def is_suffix(path: str, name: str) -> bool:
    """Whether ``name`` is the path, or the end of it after a separator; with one, the path."""
    path = (path if "#" in name else without_counts(path)).replace(".", "/")
    name = name.replace(".", "/").rstrip("/")
    return f"/{path}" == name or path == name or path.endswith("/" + name)


def value_for(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    r"""Return the value of the first key that matches the end of a path after a separator.

    This is the rule of PEFT's rank_pattern and alpha_pattern.

    Example:
        >>> value_for("blocks/3/mlp/fc1", {"fc2": 8, r"mlp.fc\d": 16}, 4)
        16
    """
    for key, value in pattern.items():
        dotted = (path if "#" in key else without_counts(path)).replace("/", ".")
        if re.fullmatch(rf"(.*\.)?({key.replace('/', '.')})", dotted):
            return value
    return default


def index_of(path: str, patterns: Sequence[str] | None = None) -> int | None:
    """Return the number of a layer's block, for ``lora_layers``; None outside of a block.

    Without patterns it is the first level of the path that is a number, except for the first
    level. A pattern is the name of the level before the number, like PEFT's layers_pattern,
    or the beginning of a level that ends in the number, which is how Keras names layers.

    Example:
        >>> path = "stages/2/blocks/0/mlp/fc1"
        >>> index_of(path), index_of(path, ["blocks"]), index_of("block3/fc", ["block"])
        (2, 0, 3)
    """
    dotted = without_counts(path).replace("/", ".")
    for pattern in patterns or (ANY_LEVEL,):
        # The first number counts, not the last, because a block may contain another list.
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", dotted)
        if found is None and patterns:
            found = re.match(rf"(?:^|.*?\.)(?:{pattern})(?:_|(?<!\d))(\d+)\.", dotted)
        if found:
            return int(found.groups()[-1])
    return None


def check_expression(targets: Targets, field: str = "lora_targets") -> None:
    """Raise a ValueError if ``targets`` is a string but not a regular expression."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"Received {field}={targets!r}, which is not a regular expression: "
                f"{error}. For layer names pass a list."
            ) from error


def resolve(targets: Targets, presets: Presets) -> tuple[Targets, bool]:
    """Replace the name of a preset by its targets, and return whether it was one.

    A preset is for all models of an architecture, so a model need not have all of its names.
    """
    if targets is None:
        targets = "default"
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = "all"
    if isinstance(targets, str) and targets in presets:
        return presets[targets], True
    return targets, False


def unmatched(targets: Targets, paths: list[str]) -> list[str]:
    """Return the entries of a list of targets that match no path."""
    if targets is None or isinstance(targets, str):
        return []
    return [name for name in targets if not any(is_suffix(p, name) for p in paths)]


def nearest(names: Iterable[str], candidates: list[str], limit: int = 20) -> list[str]:
    """Return candidates for an error message, the most similar first."""
    wanted = list(names)

    def distance(path: str) -> float:
        # Compare with the end of the path, of as many levels as the name has.
        scores = []
        for name in wanted:
            parts = name.replace(".", "/").count("/") + 1
            tail = "/".join(path.split("/")[-parts:])
            scores.append(difflib.SequenceMatcher(None, name, tail).ratio())
        return -max(scores, default=0.0)

    return sorted(candidates, key=distance)[:limit]


def no_match_error(
    targets: Any, candidates: dict[str, Any], presets: Presets, field: str = "lora_targets"
) -> ValueError:
    """Create the error for targets that match no layer, or none that can be adapted."""
    wanted = [targets] if isinstance(targets, str) else list(targets or ())
    paths = nearest(wanted, list(candidates))
    listed = ", ".join(f"{path} ({type(candidates[path]).__name__})" for path in paths)
    more = len(candidates) - len(paths)
    tail = f" and {more} more" if more > 0 else ""
    return ValueError(
        f"Received {field}={targets!r}, which matches no layer that can be adapted. "
        + (
            f"Candidates, nearest first: {listed}{tail}. Presets: {', '.join(presets)}."
            if candidates
            else "The model has no layer of a supported type."
        )
    )
