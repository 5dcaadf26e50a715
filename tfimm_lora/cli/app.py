"""The entry point ``main`` and what the subcommands share.

Importing this package loads neither TensorFlow nor Keras, and only the subcommand that is
called is imported, so ``--help``, ``--version`` and usage errors take no time. Commands call
``import_tensorflow`` before they open a model.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from tfimm_lora.backend import automatic_selection, installed, uses_legacy_keras
from tfimm_lora.cli.commands import COMMANDS
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.version import __version__

require("typer", extra="cli", why="The command line")

import typer  # noqa: E402 - after the check, whose message says what to install
from typer.core import TyperCommand, TyperGroup  # noqa: E402
from typer.main import get_group  # noqa: E402

DONE, FAILED, INTERRUPTED = 0, 1, 130


class _Commands(TyperGroup):
    """The subcommands, each imported when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # ``--help`` and messages need no more of those that are not imported.
        named = {name: TyperCommand(name, help=text) for name, text in COMMANDS.items()}
        self.commands = {**named, **self.commands}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in COMMANDS:
            importlib.import_module(f"tfimm_lora.cli.{args[0]}")
            self.commands[args[0]] = get_group(app).commands[args[0]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tfimm-lora",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune image models with LoRA on your own pictures.",
    epilog="Start with: tfimm-lora finetune --model MODEL --data PICTURES --out RUN",
)

#: ``--json`` of every command that prints a result.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]

_debug = False

#: Whether the command line has this process for itself: ``main`` was called without arguments.
_owns_process = False


def _show_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _common_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Options before the subcommand."""
    global _debug
    _debug = debug


def import_tensorflow() -> None:
    """Import TensorFlow, if it is installed, without its start-up messages on stderr.

    No setting silences the messages that are printed during the import, so stderr goes to a
    temporary file meanwhile. If TensorFlow is already imported or the user has set
    ``TF_CPP_MIN_LOG_LEVEL``, nothing is silenced. Where TensorFlow is not installed, a note
    names the framework that was selected instead.
    """
    selection = automatic_selection()
    if selection:
        note(selection)
    if "tensorflow" in sys.modules or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return
    if not installed("tensorflow"):
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as messages:
        os.dup2(messages.fileno(), 2)
        try:
            importlib.import_module("tensorflow")
        except BaseException:
            messages.seek(0)
            os.write(stderr, messages.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_keras_to_count() -> None:
    """Import Keras to create models whose weights are counted and not used.

    Keras 3 on NumPy starts in half of the time of TensorFlow, but needs JAX to be installed.
    The backend of Keras cannot be changed later, so it is chosen only in a process of the
    command line.
    """
    chosen = uses_legacy_keras() or "KERAS_BACKEND" in os.environ or "keras" in sys.modules
    if chosen or not _owns_process or not installed("jax"):
        import_tensorflow()
    else:
        os.environ["KERAS_BACKEND"] = "numpy"


def emit(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result on stdout, as one JSON document or with ``show``.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have. Use None instead.
    """
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        show()


def note(message: str) -> None:
    """Print a message that is not part of the result on stderr."""
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tfimm-lora`` with the given arguments.

    Args:
        argv: The arguments after the program name. Default: those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failure (the reason is on stderr), 2 for wrong
        usage, 130 for an interruption.

    Example:
        >>> from tfimm_lora.cli import main
        >>> main(["inspect", "no/such/adapter"])
        1
    """
    global _debug, _owns_process
    _debug, _owns_process = False, argv is None
    try:
        with _warnings_as_notes():
            app(args=None if argv is None else list(argv), prog_name="tfimm-lora")
    except SystemExit as end:  # typer exits this way, after wrong usage too
        return end.code if isinstance(end.code, int) else DONE
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - users get one line, and all of it with --debug
        if _debug:
            traceback.print_exc()
        note(f"error: {_message(error)}")
        return FAILED
    return DONE


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print warnings without their place in the code, which does not help users."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _message(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__
