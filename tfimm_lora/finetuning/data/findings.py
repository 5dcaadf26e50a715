"""``Finding`` and ``Problem``: what a check of the data found, and sentences about it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """A fault in the data, or what its owner should know about it.

    Attributes:
        level: "error" stops a training, "warning" does not.
        message: What was found, what was expected, and what to do.
        files: The files concerned. A training can do without those of an error.
        cause: The class of the exception for an error.
    """

    level: str
    message: str
    files: tuple[str, ...] = ()
    cause: type[Exception] = ValueError


@dataclass(frozen=True)
class Problem:
    """A picture that cannot be used, with the reason."""

    path: str
    label: str
    reason: str


def raise_errors(findings: Iterable[Finding]) -> None:
    """Raise one exception with all errors; do nothing if there are none.

    Raises:
        ValueError, FileNotFoundError: the cause that all errors share, or ValueError.
    """
    errors = [x for x in findings if x.level == ERROR]
    if not errors:
        return
    causes = {x.cause for x in errors}
    cause = causes.pop() if len(causes) == 1 else ValueError
    if len(errors) == 1:
        raise cause(errors[0].message)
    listed = "".join(f"\n  {i}. {x.message}" for i, x in enumerate(errors, 1))
    raise cause(f"The data have {len(errors)} faults:{listed}")


def warn(findings: Iterable[Finding], stacklevel: int) -> None:
    """Issue each warning, at the given level of the stack above the caller of this function."""
    for finding in findings:
        if finding.level == WARNING:
            warnings.warn(finding.message, stacklevel=stacklevel + 1)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and the number of the others.

    Example:
        >>> from tfimm_lora.finetuning.data.findings import some
        >>> some(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> from tfimm_lora.finetuning.data.findings import count
        >>> count(1, "class", "classes"), count(2, "picture")
        ('1 class', '2 pictures')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
