"""The engine server's side: an ASGI middleware that answers ``/weightsync/*`` and nothing else.

vLLM loads it with ``--middleware weightsync_server.middleware.WeightsyncMiddleware``; any ASGI
app that has an engine client at ``app.state.engine_client`` can.  Every call needs the shared
secret (:mod:`weightsync_server.secret`).  It decides nothing: pausing, resuming and who may do so
are the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import pydantic
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from weightsync.errors import (
    AuthError,
    BodyTooLargeError,
    DeadlineError,
    EngineError,
    InputError,
    WeightSyncError,
)
from weightsync.protocol import (
    PROTOCOL_VERSION,
    Message,
    PauseMode,
    Seconds,
    WorkerCommand,
    faults,
)
from weightsync_server.engines import vllm_compat as compat
from weightsync_server.same_host import is_from_same_host
from weightsync_server.secret import HEADER, load_secret, same_secret
from weightsync_server.turns import Turns, server_turns

PREFIX = "/weightsync/"
#: bytes of one command; the agent's own limit is lower
MAX_BODY_NBYTES = 1 << 30
_SMALL_NBYTES = 64 << 10
#: seconds that calls without a deadline of their own may take
CALL_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class EnginePauseRequest(Message):
    """``POST /weightsync/pause``.  ``reset_caches``: drop them, too, once it is paused."""

    mode: PauseMode = "keep"
    timeout_s: Seconds = 60.0
    turn: str | None = None
    reset_caches: bool = False


class EngineResumeRequest(Message):
    """``POST /weightsync/resume``."""

    turn: str | None = None


class WeightsyncMiddleware:
    """See the module's docstring.

    Args:
        app: The ASGI app that everything else goes to, untouched.
        secret: The shared secret; None: as :func:`weightsync_server.secret.load_secret` finds it.
    """

    def __init__(self, app: ASGIApp, secret: str | None = None) -> None:
        self._app = app
        self._secret = load_secret() if secret is None else secret
        self._instance = uuid.uuid4().hex
        self._turns: Turns | None = None
        self._identity: compat.EngineIdentity | None = None
        self._routes: dict[tuple[str, str], Callable[[Request, Any], Awaitable[dict[str, Any]]]] = {
            ("GET", "info"): self._info,
            ("GET", "is_paused"): self._is_paused,
            ("POST", "pause"): self._pause,
            ("POST", "resume"): self._resume,
            ("POST", "reset_prefix_cache"): self._reset_prefix_cache,
            ("POST", "rpc"): self._rpc,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = JSONResponse(await self._answer(request))
        except WeightSyncError as error:
            problem = error.to_problem()
            response = JSONResponse(
                problem, status_code=problem["status"], media_type="application/problem+json"
            )
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> dict[str, Any]:
        # the engine's server may listen to the world; these calls are for the agent beside it
        if not is_from_same_host(request.scope):
            raise AuthError(
                f"{PREFIX}* is for the agent on this host, not for {request.scope['client'][0]}",
                hint="speak to the agent: it is the door to the outside",
            )
        if not same_secret(request.headers.get(HEADER), self._secret):
            raise AuthError(
                "the engine secret is missing or wrong",
                hint="agent and engine must run as one user, or be given the same "
                "WEIGHTSYNC_ENGINE_SECRET or WEIGHTSYNC_ENGINE_SECRET_FILE",
            )
        name = request.url.path.removeprefix(PREFIX)
        route = self._routes.get((request.method, name))
        if route is None:
            raise InputError(
                f"no call {request.method} {request.url.path} here",
                hint="agent and engine must have the same version of weightsync",
            )
        client = getattr(getattr(request.scope.get("app"), "state", None), "engine_client", None)
        if client is None:
            raise EngineError("the engine has not started yet", hint="wait for it")
        if getattr(client, "errored", False):
            raise EngineError("the engine has died", hint="look at its log and restart it")
        try:
            return await route(request, client)
        except WeightSyncError:
            raise
        except Exception as error:
            log.exception("the engine failed in %s", name)
            raise EngineError(
                f"the engine failed in {name}: {type(error).__name__}: {error}",
                hint="look at the engine's log",
            ) from error

    async def _info(self, _request: Request, client: Any) -> dict[str, Any]:
        if self._identity is None:
            self._identity = compat.identify(client)
            for warning in self._identity.warnings:
                log.warning(warning)
        return dataclasses.asdict(self._identity) | {
            "instance": self._instance,
            "protocol_version": PROTOCOL_VERSION,
        }

    async def _is_paused(self, _request: Request, client: Any) -> dict[str, Any]:
        # Who asks decides by the answer: what was sent before, and is heard later, is void.
        async with self._take(client, None, CALL_TIMEOUT_S) as turn:
            paused = await _within(compat.is_paused(client), CALL_TIMEOUT_S, "is_paused")
        return {"is_paused": paused, "turn": turn}

    async def _pause(self, request: Request, client: Any) -> dict[str, Any]:
        ask = _parsed(EnginePauseRequest, await _body(request))
        async with self._take(client, ask.turn, ask.timeout_s) as turn:
            await _within(compat.pause(client, ask.mode), ask.timeout_s, f"pause ({ask.mode})")
        if ask.reset_caches:
            await self._reset_prefix_cache(request, client)
        return {"is_paused": True, "turn": turn}

    async def _resume(self, request: Request, client: Any) -> dict[str, Any]:
        ask = _parsed(EngineResumeRequest, await _body(request) or b"{}")
        async with self._take(client, ask.turn, CALL_TIMEOUT_S) as turn:
            await _within(compat.resume(client), CALL_TIMEOUT_S, "resume")
        return {"is_paused": False, "turn": turn}

    def _take(
        self, client: Any, asked: str | None, timeout_s: float, *, last: bool = False
    ) -> AbstractAsyncContextManager[str]:
        if self._turns is None:
            self._turns = server_turns(compat.server_processes(client))
        return self._turns.take(asked, timeout_s, last=last)

    async def _reset_prefix_cache(self, _request: Request, client: Any) -> dict[str, Any]:
        await _within(compat.reset_caches(client), CALL_TIMEOUT_S, "reset_prefix_cache")
        return {"reset": True}

    async def _rpc(self, request: Request, client: Any) -> dict[str, Any]:
        raw = await _body(request)
        if len(raw) <= _SMALL_NBYTES:  # a thread would cost more
            command = _parsed(WorkerCommand, raw)
        else:
            command = await asyncio.to_thread(_parsed, WorkerCommand, raw)
        async with contextlib.AsyncExitStack() as turn:
            if command.turn is not None:
                # a rollback or reload changes live weights: heard late, the engine may run (WS-1)
                taken = self._take(client, command.turn, command.timeout_s, last=True)
                await turn.enter_async_context(taken)
            await _within(
                compat.call_workers(client, raw.decode(), command.timeout_s),
                command.timeout_s,
                f"the workers' {command.op}",
            )
        return {"call_id": command.call_id}


async def _within(work: Awaitable[T], timeout_s: float, what: str) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as error:
        raise DeadlineError(
            f"{what} took the engine more than {timeout_s:g} s",
            hint="look at the engine's log; raise the timeout if it only is slow",
            phase=what,
            timeout_s=timeout_s,
        ) from error


async def _body(request: Request) -> bytes:
    chunks: list[bytes] = []
    nbytes = 0
    async for chunk in request.stream():
        nbytes += len(chunk)
        if nbytes > MAX_BODY_NBYTES:
            raise BodyTooLargeError(
                f"the body is over {MAX_BODY_NBYTES} bytes", hint="check what was sent"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _parsed(kind: type[M], raw: bytes) -> M:
    try:
        return kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise InputError(
            f"not a {kind.__name__}: {faults(error)}",
            hint="agent and engine must have the same version of weightsync",
        ) from error
