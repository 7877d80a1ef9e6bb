"""With TLS: a plain listener beside it, for those that have no certificate.

The engine's workers answer over loopback, under the engine secret, to an agent whose certificate
names another host; and a kubelet can show no client certificate.  Nothing else is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from weightsync.errors import AuthError
from weightsync_server.agent.auth import REPLY_PATH
from weightsync_server.agent.problems import problem_response

_PATHS = {"/healthz", "/readyz", REPLY_PATH}


class SideDoor(uvicorn.Server):
    """Serves probes and workers' answers on the event loop of the agent's server.

    Args:
        app: The agent's; it guards itself.
        sock: Listens; closed by :meth:`stop`.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                only_for_side_door(app),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._sock = sock
        self._running: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the agent's server's."""
        yield

    def open(self) -> None:
        """Serve from now on."""
        self._running = asyncio.create_task(self.serve(sockets=[self._sock]))

    async def stop(self) -> None:
        """End what runs, and the listener."""
        self.should_exit = True
        if self._running is not None:
            await self._running


def only_for_side_door(app: ASGIApp) -> ASGIApp:
    """``app``, of which nothing but probes and workers' answers is to be seen."""

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in _PATHS:
            await app(scope, receive, send)
            return
        error = AuthError(
            "this port is for probes and for the engine's workers", hint="use the port with TLS"
        )
        await problem_response(error, headers={"Connection": "close"})(scope, receive, send)

    return door
