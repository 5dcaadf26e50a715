"""Errors of pretrained weights that cannot be loaded, with the ways forward."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

#: What to do instead, on the command line and in Python.
WAYS_FORWARD = (
    "Pass --weights FILE (weights=) to load weights from a file, or --from-scratch "
    "(pretrained=False) to start from random weights."
)

#: Seconds without an answer after which a download fails.
_TIMEOUT = 30.0


def no_pretrained_weights(name: str, reason: str) -> ValueError:
    """The error for a model that nobody has published weights for."""
    return ValueError(
        f"Received model {name!r}, which has no pretrained weights: {reason}. {WAYS_FORWARD}"
    )


@contextlib.contextmanager
def downloading(name: str, cache: str) -> Iterator[None]:
    """Translate the errors of a download, and keep its progress away from stdout.

    Args:
        name: The name of the model.
        cache: How to fill the cache, as a sentence.

    Raises:
        ConnectionError: if the weights are neither cached nor could be downloaded.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (ImportError, PermissionError, TypeError):
        raise
    except OSError as error:
        raise _not_loaded(name, cache, error) from error
    except Exception as error:
        # keras.utils.get_file raises a bare Exception for a failed download.
        if type(error) is not Exception:
            raise
        raise _not_loaded(name, cache, error) from error
    finally:
        socket.setdefaulttimeout(before)


def _not_loaded(name: str, cache: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().rstrip(".")
    return ConnectionError(
        f"The pretrained weights of {name} could not be loaded: {reason}. {cache} "
        f"{WAYS_FORWARD}"
    )
