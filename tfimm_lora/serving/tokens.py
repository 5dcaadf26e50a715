"""Who may add and remove adapters: requests with the token of the server."""

from __future__ import annotations

import hmac

from fastapi import Request
from fastapi.security import HTTPBearer

from tfimm_lora.serving.errors import RequestError

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class TokenCheck(HTTPBearer):
    """A dependency that refuses requests without the token.

    Args:
        token: The token; None refuses all requests.
    """

    def __init__(self, token: str | None) -> None:
        super().__init__(auto_error=False, description="The token of the server.")
        self._token = token

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        if self._token is None:
            raise RequestError(
                403,
                "a request to change adapters, but the server has no token",
                "a server that was started with --token-file or TFIMM_LORA_TOKEN",
            )
        credentials = await super().__call__(request)
        if credentials is None:
            raise RequestError(
                401,
                "no token",
                "the header 'Authorization: Bearer TOKEN'",
                headers=_CHALLENGE,
            )
        # In constant time, so that no answer tells how much of a token is right.
        given, expected = credentials.credentials.encode(), self._token.encode()
        if not hmac.compare_digest(given, expected):
            raise RequestError(
                401, "another token", "the token of the server", headers=_CHALLENGE
            )
