"""``RequestError``: an answer with an error status, and its body."""

from __future__ import annotations

from collections.abc import Mapping

#: The most characters of a request that an error message repeats.
_SHOWN = 100

#: For requests that may succeed when they are sent again.
RETRY = {"Retry-After": "1"}


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        received: What the request contained, or what happened.
        expected: What was expected, and what to do.
        headers: Additional headers of the answer.
    """

    def __init__(
        self,
        status: int,
        received: str,
        expected: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"Received {received}; expected {expected}.")
        self.status = status
        self.received = received
        self.expected = expected
        self.headers = dict(headers or {})

    def body(self) -> dict[str, str]:
        """The JSON body of the answer."""
        return {
            "message": str(self),
            "received": self.received,
            "expected": self.expected,
        }


def shown(value: object) -> str:
    """A value of a request for an error message: printable ASCII, and not too long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
