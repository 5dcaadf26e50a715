"""The command line ``tfimm-lora``: one file for each subcommand."""

from tfimm_lora.cli.app import main

__all__ = ["main"]
