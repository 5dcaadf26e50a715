"""Which modules a PEFT config selects, by PEFT's own rules.

The rules are those of ``check_target_module_exists`` and ``_set_trainable`` in PEFT. They
differ from those of ``lora_targets`` in details, some of which are accidents of PEFT's
implementation, but decide which modules an adapter file contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tfimm_lora.peft.fields import ALL_LINEAR

#: What the names of modules begin with where PEFT looks for modules_to_save.
_WRAPPED = "base_model.model."

#: The number of a block where layers_pattern is not given: the first one after two levels.
_ANY_LEVEL = r".*?\.[^.]*\.(?P<idx>\d+)\."

#: A function of a pattern, a text and whether to match all of the text.
Match = Callable[[str, str, bool], "re.Match[str] | None"]


def match(pattern: str, text: str, whole: bool) -> re.Match[str] | None:
    """Match a pattern with the beginning of a text, or with all of it.

    Raises:
        ValueError: If the pattern is not a regular expression. The message is the end of a
            sentence, as in ``PeftFields``.
    """
    try:
        return re.fullmatch(pattern, text) if whole else re.match(pattern, text)
    except re.error as error:
        raise ValueError(
            f"has the pattern {pattern!r}, which is not a regular expression: {error}"
        ) from error


@dataclass(frozen=True)
class PeftSelection:
    """The modules that a PEFT config adapts, and those that it trains fully.

    Attributes:
        targets: target_modules: a regular expression for the whole path, or names of which each
            is a path or the end of one, beginning after a dot. None selects nothing.
        exclude: exclude_modules, in the same two forms; empty for none.
        fully_trained: modules_to_save.
        blocks: layers_to_transform, or None for all.
        patterns: layers_pattern; empty for any level but the first.
        match: The function that matches regular expressions.
    """

    targets: str | tuple[str, ...] | None
    exclude: str | tuple[str, ...] = ()
    fully_trained: tuple[str, ...] = ()
    blocks: tuple[int, ...] | None = None
    patterns: tuple[str, ...] = ()
    match: Match = match

    @classmethod
    def of(cls, fields: Mapping[str, Any], match: Match = match) -> PeftSelection:
        """Return the selection of the fields of a config, whose types were checked."""
        blocks, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
        return cls(
            _names(fields.get("target_modules")),
            _names(fields.get("exclude_modules")) or (),
            tuple(fields.get("modules_to_save") or ()),
            (blocks,) if isinstance(blocks, int) else tuple(blocks) if blocks else None,
            (patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ()),
            match,
        )

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are PEFT's "all-linear", which stands for names of modules."""
        return isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR

    def adapts(self, module: str) -> bool:
        """Whether PEFT adapts a module, provided that it is of a supported type."""
        if self.targets is None or self.excludes(module):
            return False
        if isinstance(self.targets, str):
            return bool(self.match(self.targets, module, True))
        # The number of a block does not matter for a module that is named in full.
        return module in self.targets or (
            _is_end(module, self.targets) and self._is_in_blocks(module)
        )

    def excludes(self, module: str) -> bool:
        """Whether a module is excluded, or in one that is fully trained."""
        if isinstance(self.exclude, str):
            excluded = bool(self.match(self.exclude, module, True))
        else:
            excluded = module in self.exclude or _is_end(module, self.exclude)
        return excluded or any(
            self.match(rf"(^|.*\.){name}($|\..*)", module, False) for name in self.fully_trained
        )

    def trains(self, module: str) -> bool:
        """Whether PEFT trains a module fully: if its name ends in one, after a dot or not."""
        return self.trained_by(module) is not None

    def trained_by(self, module: str) -> str | None:
        """Return the name in modules_to_save because of which PEFT trains a module, or None."""
        path = _WRAPPED + module
        return next((name for name in self.fully_trained if path.endswith(name)), None)

    def _is_in_blocks(self, module: str) -> bool:
        if self.blocks is None:
            return True
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.patterns]
        for expression in expressions or (_ANY_LEVEL,):
            found = self.match(expression, module, False)
            if found:
                number = found.groupdict().get("idx")
                return number is not None and int(number) in self.blocks
        return False


def with_parents(modules: Iterable[str]) -> list[str]:
    """Return module paths and those of the modules around them, each once, parents first."""
    found: dict[str, None] = {}
    for module in modules:
        levels = module.split(".")
        found.update(dict.fromkeys(".".join(levels[: i + 1]) for i in range(len(levels))))
    return [module for module in found if module]


def outermost(modules: Iterable[str]) -> list[str]:
    """Return the modules that are not inside of another one."""
    given = set(modules)
    return sorted(m for m in given if not any(p in given for p in with_parents([m]) if p != m))


def _names(given: Any) -> str | tuple[str, ...] | None:
    return given if given is None or isinstance(given, str) else tuple(given)


def _is_end(module: str, names: Iterable[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)
