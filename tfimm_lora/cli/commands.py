"""The subcommands, in the order of ``tfimm-lora --help``."""

from __future__ import annotations

import importlib

#: Modules of this package. Importing one registers its command.
COMMANDS: tuple[str, ...] = (
    *("models", "plan", "check", "finetune", "evaluate", "predict", "merge", "export", "serve"),
    *("inspect", "convert", "combine", "diff"),
)


def register() -> None:
    """Register all subcommands with ``app``."""
    for name in COMMANDS:
        importlib.import_module(f"tfimm_lora.cli.{name}")
