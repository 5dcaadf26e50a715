"""``connect``: several JAX processes that train together, with JAX's own service."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

#: The variables of ``keras.distribution.initialize``.
VARIABLES = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
_PREFIX = "KERAS_DISTRIBUTION_"

EXAMPLE = ", ".join(
    f"{_PREFIX}{name}={value}" for name, value in zip(VARIABLES, ("10.0.0.1:12345", "2", "0"))
)


def process_settings(environ: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """The address of process 0, the number of processes and the index of this one.

    Returns:
        The three values; None if no variable is set, so that JAX looks for them.

    Raises:
        ValueError: if only some variables are set, or one has an impossible value.

    Example:
        >>> from tfimm_lora.finetuning.distributed.processes import process_settings
        >>> process_settings({"KERAS_DISTRIBUTION_JOB_ADDRESSES": "10.0.0.1:12345",
        ...     "KERAS_DISTRIBUTION_NUM_PROCESSES": "2", "KERAS_DISTRIBUTION_PROCESS_ID": "1"})
        ('10.0.0.1:12345', 2, 1)
    """
    given = {_PREFIX + name: environ.get(_PREFIX + name, "") for name in VARIABLES}
    if not any(given.values()):
        return None
    addresses, count, index = given.values()
    first, *others = addresses.split(",")
    try:
        host, _, port = first.rpartition(":")
        valid = bool(host) and int(port) > 0 and 0 <= int(index) < int(count)
        if valid and len(others) + 1 in (1, int(count)):
            return first, int(count), int(index)
    except ValueError:
        pass
    listed = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ValueError(
        f"Received {listed}; expected the address of process 0, the number of processes and "
        f"the index of this one, such as {EXAMPLE}."
    )


@cache
def connect(patience: float) -> None:
    """Connect with all other processes, unless ``jax.distributed`` is initialized already.

    Args:
        patience: The timeout in seconds. JAX waits without running Python and then aborts, so
            a process that waits longer prints a message and exits with code 1.

    Raises:
        ValueError: if the processes are not known from the environment.
        RuntimeError: if JAX was used before, or the address cannot be used.
    """
    import jax

    if not jax.distributed.is_initialized():
        given = process_settings()
        # SIGTERM, with which schedulers end a job, would otherwise be caught and ignored.
        with contextlib.suppress(AttributeError):
            jax.config.update("jax_enable_preemption_service", False)
        with _no_longer_than(patience, given):
            _initialize(jax, given, patience)
        # Python's exit waits for JAX, which waits for all processes.
        atexit.register(_exit_after_failure)
    with _stdout_to_stderr():  # Gloo prints on stdout when it connects
        from jax.experimental import multihost_utils

        multihost_utils.process_allgather(np.zeros(1, np.int32))


def leave() -> None:
    """Leave the other processes, so that they can end. All of them must call this."""
    import jax

    jax.distributed.shutdown()


@contextlib.contextmanager
def noted_failure() -> Iterator[None]:
    """After an error in this block, this process will exit without waiting for the others.

    JAX waits minutes for them at exit, and they wait for this process.
    """
    try:
        yield
    except BaseException as error:
        _failed.append(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise


#: The exit code after a failure.
_failed: list[int] = []


def _exit_after_failure() -> None:
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_failed[0])


def _initialize(jax: Any, given: tuple[str, int, int] | None, patience: float) -> None:
    # Longer than `_no_longer_than`, because JAX aborts the process.
    options = {"initialization_timeout": round(patience) + 60}
    try:
        if given is not None:
            jax.distributed.initialize(*given, cluster_detection_method="deactivate", **options)
        else:
            jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f"Received strategy='multihost' without {_PREFIX}{VARIABLES[0]} in the "
            f"environment, and JAX finds no cluster ({error}); expected one of Slurm, Open "
            f"MPI, Kubernetes or TPUs, or {EXAMPLE}."
        ) from error
    except RuntimeError as error:
        raise RuntimeError(
            f"JAX cannot connect the processes: {error} Start each process with a free port "
            "at the address of process 0, and before any other use of JAX."
        ) from error


@contextlib.contextmanager
def _no_longer_than(seconds: float, given: tuple[str, int, int] | None) -> Iterator[None]:
    """Exit the process with a message if the block takes longer."""

    def give_up() -> None:
        who = "This process" if given is None else f"Process {given[2]} of {given[1]}"
        where = "" if given is None else f" at {given[0]}, the address of process 0"
        print(
            f"error: {who} has waited {seconds:g} seconds for the others{where}. Start all "
            "processes, each with its own index.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
