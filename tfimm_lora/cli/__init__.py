"""The command line ``tfimm-lora``: one module for each subcommand."""

from tfimm_lora.cli.app import main

__all__ = ["main"]
