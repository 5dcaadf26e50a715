"""``check_data``: all that is wrong with a folder or CSV file of pictures, in one pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from tfimm_lora.finetuning.data.class_targets import CLASSES
from tfimm_lora.finetuning.data.dataset import Split, list_split
from tfimm_lora.finetuning.data.findings import (
    ERROR,
    WARNING,
    Finding,
    Problem,
    count,
    raise_errors,
    some,
)
from tfimm_lora.finetuning.data.pictures import inspect_pictures, without
from tfimm_lora.finetuning.data.targets import Targets


@dataclass(frozen=True)
class DataCheck:
    """What was found in labelled pictures.

    Attributes:
        listed: The pictures that are listed, in parts, if they can be split.
        split: Those that can be used; None if they do not suffice for a training.
        problems: The pictures to leave out: they cannot be read, have two labels, or would be
            in two parts.
        findings: The errors, which stop a training, and the warnings.
    """

    listed: Split | None
    split: Split | None
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop a training."""
        return [x for x in self.findings if x.level == ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that do not stop a training."""
        return [x for x in self.findings if x.level == WARNING]

    def usable(self) -> Split:
        """The pictures to train on.

        Raises:
            ValueError, FileNotFoundError: if there are errors, with all of them.
        """
        raise_errors(self.findings)
        assert self.split is not None
        return self.split


def check_data(
    data: str | os.PathLike[str],
    *,
    validation: float = 0.2,
    seed: int = 0,
    targets: Targets = CLASSES,
    on_error: str = "skip",
    say: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Find labelled pictures, read each once, and return all that is wrong with them.

    Args:
        data, validation, seed, targets: As for ``find_pictures``.
        on_error: "skip" to leave out pictures that cannot be used, "refuse" to make them an
            error.
        say: Called with a message before the pictures are read.
        progress: Called as ``progress(done, total)`` after each picture.

    Raises:
        ValueError: for a share ``validation`` that is out of range.
    """
    listed, findings = list_split(data, validation=validation, seed=seed, targets=targets)
    if listed is None:
        return DataCheck(None, None, (), tuple(findings))
    say(
        f"checking {count(len(listed), 'picture')} of {_outputs(listed)}: "
        f"{len(listed.train)} for training, {len(listed.val)} for validation"
        + (f", {len(listed.test)} for testing" if listed.test is not None else "")
    )
    problems, more = inspect_pictures(listed, progress=progress)
    findings += more
    if problems and on_error == "refuse":
        reasons = "".join(f"\n     {x.path}: {x.reason}" for x in problems)
        message = (
            f"{count(len(problems), 'picture')} of {len(listed)} cannot be used; expected none "
            f'with on_error="refuse". Repair or remove them, or pass "skip":{reasons}'
        )
        findings.append(Finding(ERROR, message, tuple(x.path for x in problems)))
    split = None
    faulty = {path for x in more if x.level == ERROR for path in x.files}
    try:
        split = without(
            listed, [*problems, *(Problem(path, "", "see the errors") for path in faulty)]
        )
    except ValueError as error:
        if not faulty:  # else there are no others, for reasons that are recorded
            findings.append(Finding(ERROR, str(error)))
    else:
        before, after = listed.val.counts(), split.val.counts()
        lost = [label for label in before if before[label] and not after[label]]
        if lost:
            message = (
                f"No validation pictures of these {targets.nouns} can be used: "
                f"{some(lost)}. The model cannot be evaluated on them."
            )
            findings.append(Finding(WARNING, message))
    return DataCheck(listed, split, tuple(problems), tuple(findings))


def _outputs(split: Split) -> str:
    """The number of classes, labels or numbers of a split, in words."""
    return count(len(split.labels), split.targets.noun, split.targets.nouns)
