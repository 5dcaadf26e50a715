"""``until_exit``: Python functions in tf.data that do not keep Python from ending.

TensorFlow calls them from its own threads. If Python ends while an iterator is alive, it waits
for the iterator, the iterator for its threads, and these for Python, which no longer runs them.
"""

from __future__ import annotations

import atexit
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

#: The seconds without a call after which TensorFlow is taken to have stopped, and the most that
#: Python waits for it.
_QUIET, _MOST = 0.05, 5.0

_lock = threading.Lock()
_running, _last_call, _ending = 0, 0.0, False


def until_exit(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which raises a StopIteration instead once Python ends."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        global _running
        with _lock:
            _note_call()
            if _ending:
                raise StopIteration("Python ends.")
            _running += 1
        try:
            return function(*args)
        finally:
            with _lock:
                _note_call()
                _running -= 1

    return call


def _note_call() -> None:
    global _last_call
    _last_call = time.monotonic()


@atexit.register
def _end() -> None:
    """Stop the functions, and wait until TensorFlow, with its buffers full, calls none."""
    global _ending
    with _lock:
        _ending, used = True, _last_call > 0
        _note_call()
    deadline = time.monotonic() + _MOST
    while used and time.monotonic() < deadline:
        with _lock:
            quiet = not _running and time.monotonic() - _last_call >= _QUIET
        if quiet:
            return
        time.sleep(_QUIET / 5)
