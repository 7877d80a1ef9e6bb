"""Who may call, and how much they may send: checked before anything of a body is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightsync.errors import (
    AuthError,
    BodyTooLargeError,
    InputError,
    TooManyAttemptsError,
    WeightSyncError,
)
from weightsync_server.agent.pages import FOLDER
from weightsync_server.agent.problems import problem_response
from weightsync_server.agent.tokens import FailedAttempts, Tokens
from weightsync_server.same_host import is_from_same_host, is_loopback
from weightsync_server.secret import HEADER, same_secret

#: no token needed: probes of a load balancer or an orchestrator, and the page, which asks for it
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/"})
#: no body has a length with more
_MAX_DIGITS = 19
#: takes the engine's secret instead of the token
REPLY_PATH = "/internal/reply"


class Gate:
    """ASGI middleware: token or secret, and the limit of bodies.

    Args:
        app: What is guarded.
        tokens: The bearer tokens; None: none is asked for (loopback only).
        secret: The engine's secret.
        max_body_nbytes: Bytes that a body may have.
        count: Told the path and the code of each refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        tokens: Tokens | None,
        secret: str,
        max_body_nbytes: int,
        count: Callable[[str, str], None],
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._attempts = FailedAttempts()
        self._secret = secret
        self._max_body_nbytes = max_body_nbytes
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_caller(scope, headers)
            self._check_length(headers)
        except WeightSyncError as error:
            self._count(scope["path"], error.code)
            # the body stays unread, so the connection cannot be used again
            answer = problem_response(error, headers={"Connection": "close"})
            if isinstance(error, TooManyAttemptsError):
                answer.headers["Retry-After"] = str(math.ceil(error.context["retry_after_s"]))
            await answer(scope, receive, send)
            return
        await self._limited(scope, receive, send)

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] == REPLY_PATH:
            # workers are on this host: they come over loopback, or from the address that they call
            if not is_from_same_host(scope):
                raise AuthError(
                    f"{REPLY_PATH} is for the engine's workers on this host, not for "
                    f"{scope['client'][0]}",
                    hint="trainers use the other calls, with the token",
                )
            if not same_secret(headers.get(HEADER), self._secret):
                raise AuthError(
                    "the engine secret is missing or wrong",
                    hint="engine and agent must find the same secret",
                )
            return
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(FOLDER):
            return
        if self._tokens is None:
            _check_not_a_browser(headers)
            return
        peer = scope.get("client")
        self._attempts.check(peer)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._tokens.accept(given.strip()):
            # a call without any token is a mistake, and guesses nothing
            if given:
                self._attempts.failed(peer)
            raise AuthError(
                "the bearer token is missing or wrong",
                hint="send Authorization: Bearer TOKEN, with the token that the agent was given",
            )
        self._attempts.succeeded(peer)

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > _MAX_DIGITS:
            raise InputError(f"Content-Length is no number: {length[:32]!r}", hint="send a length")
        if int(length) > self._max_body_nbytes:
            raise self._too_large()

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is over {self._max_body_nbytes} bytes",
            hint="raise the agent's --max-body-nbytes if this is a real manifest or plan",
            limit=self._max_body_nbytes,
        )

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; if the body turns out too large, its answer is dropped for ours."""
        nbytes = 0
        too_large = started = False

        async def counted() -> Message:
            nonlocal nbytes, too_large
            message = await receive()
            nbytes += len(message.get("body", b""))
            if nbytes > self._max_body_nbytes:
                too_large = True
                raise self._too_large()
            return message

        async def guarded(message: Message) -> None:
            nonlocal started
            if not too_large:
                started = started or message["type"] == "http.response.start"
                await send(message)

        try:
            await self._app(scope, counted, guarded)
        except BodyTooLargeError:
            if not too_large:
                raise
        if too_large and not started:
            self._count(scope["path"], BodyTooLargeError.code)
            response = problem_response(self._too_large(), headers={"Connection": "close"})
            await response(scope, receive, send)


def _check_not_a_browser(headers: Headers) -> None:
    """Without a token, a web page must not be able to command a loopback agent."""
    origin = headers.get("origin")
    host = urlsplit(f"//{headers.get('host', '')}").hostname
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise AuthError(f"calls from the web page {origin} are refused", hint="set a token")
    if host is not None and not is_loopback(host):
        raise AuthError(
            f"an agent without a token answers to loopback names only, not to {host}",
            hint="use http://127.0.0.1, or set a token",
        )
