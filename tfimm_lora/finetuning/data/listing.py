"""``Listing``: the labelled pictures in a folder or CSV file, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tfimm_lora.finetuning.data.findings import ERROR, WARNING, Finding

#: The names of the parts of a split.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

#: The part of pictures that are still to be split into train and val.
UNSPLIT = ""


class FoundPicture(NamedTuple):
    """A picture with its target, for a class its name. It is sorted and split by ``name``."""

    name: str
    path: str
    label: Any


@dataclass
class Listing:
    """What a folder or CSV file lists.

    Attributes:
        parts: The pictures of "train", "val" and "test"; those that are still to be split into
            train and val have the key "". Files with an error are left out.
        findings: What is wrong with the data.
        columns: The columns of a CSV file with targets; none for a folder.
    """

    parts: dict[str, list[FoundPicture]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    columns: tuple[str, ...] = ()

    def error(
        self, message: str, files: Iterable[str] = (), cause: type[Exception] = ValueError
    ) -> None:
        """Record an error."""
        self.findings.append(Finding(ERROR, message, tuple(files), cause))

    def warning(self, message: str, files: Iterable[str] = ()) -> None:
        """Record a warning."""
        self.findings.append(Finding(WARNING, message, tuple(files)))

    def require_train(self, data: object) -> None:
        """Divide train if there is no val. Record an error for parts without train.

        Args:
            data: The folder or file, for the messages.
        """
        if "train" in self.parts and "val" not in self.parts:
            self.warning(f"{data} has no val; pictures of train are used for validation.")
            self.parts[UNSPLIT] = self.parts.pop("train")
        elif self.parts and UNSPLIT not in self.parts and "train" not in self.parts:
            self.error(f"{data} has {' and '.join(self.parts)} but no train; expected train.")
            self.parts = {}
