"""``main``: from arguments to an exit code; and what the subcommands share."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from tfimm_lora.utils.optional_imports import require
from tfimm_lora.version import __version__

typer = require("typer", extra="cli", why="The command line")

DONE, FAILED, INTERRUPTED = 0, 1, 130

app = typer.Typer(
    name="tfimm-lora",
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


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """What comes before the subcommand."""
    global _debug
    _debug = debug


def emit(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print a result on stdout: as one JSON document, or the way ``show`` does.

    Raises:
        ValueError: for a number that JSON has no word for (NaN, infinity): give None.
    """
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        show()


def note(message: str) -> None:
    """Tell on stderr what is not the result."""
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tfimm-lora`` with these arguments.

    Args:
        argv: The arguments after the program's name. Default: those of the process.

    Returns:
        The exit code: 0 done, 1 failed (the reason is on stderr), 2 wrong usage, 130
        interrupted.

    Example:
        >>> from tfimm_lora.cli import main
        >>> main(["inspect", "no/such/adapter"])
        1
    """
    from tfimm_lora.cli import commands

    commands.register()
    global _debug
    _debug = False
    try:
        with _warnings_as_notes():
            app(args=None if argv is None else list(argv), prog_name="tfimm-lora")
    except SystemExit as end:  # typer ends so, also after wrong usage, which it explains
        return end.code if isinstance(end.code, int) else DONE
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last place that can say it in one line
        if _debug:
            traceback.print_exc()
        note(f"error: {_message(error)}")
        return FAILED
    return DONE


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Say what is warned of without the place in the code, which is no user's business."""

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _message(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__
