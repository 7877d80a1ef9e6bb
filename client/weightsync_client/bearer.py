"""The token on every request: as it was given, or as its file has it at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx

from weightsync.tokens import check_token, read_tokens

#: a token, or the file that holds it in its first line
Token = str | Path


class Bearer(httpx.Auth):
    """Sends the token.  A file is read for every request, so that a long job follows its changes.

    Args:
        token: Given, or the file.

    Raises:
        InputError: It is no token, or its file holds none; from a file that later turns bad, the
            request raises it.
    """

    def __init__(self, token: Token) -> None:
        self._token = token
        if isinstance(token, Path):
            read_tokens(token)
        else:
            check_token(token, "this publisher")

    def header(self) -> str:
        """What ``Authorization`` says."""
        token = read_tokens(self._token)[0] if isinstance(self._token, Path) else self._token
        return f"Bearer {token}"

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        """Httpx's: the request, with the header."""
        request.headers["Authorization"] = self.header()
        yield request
