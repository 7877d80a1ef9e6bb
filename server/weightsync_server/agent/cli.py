"""``weightsync-agent``: the command."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from weightsync.errors import InputError, WeightSyncError
from weightsync.logs import log_to_stderr
from weightsync_server.agent.app import Agent
from weightsync_server.agent.settings import AgentSettings, load_settings
from weightsync_server.agent.side_door import SideDoor
from weightsync_server.agent.tls import Certificates
from weightsync_server.same_host import is_loopback
from weightsync_server.secret import load_secret

log = logging.getLogger("weightsync_server.agent")


class AgentServer(uvicorn.Server):
    """Ends the event streams first when it is told to stop; they would never end by themselves.

    Args:
        agent: What it serves.
        side: With TLS: the socket of the side door.

    Raises:
        InputError: The TLS files are wrong.
    """

    def __init__(self, agent: Agent, side: socket.socket | None = None) -> None:
        settings = agent.settings
        self._certificates = Certificates(settings, agent.metrics.certificate_ends)
        super().__init__(
            uvicorn.Config(
                agent.app,
                log_config=None,
                access_log=settings.log_level == "debug",
                lifespan="on",
                ws="none",
                # who calls is who is connected, whatever a header says: limits go by address
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
                **self._certificates.options,
            )
        )
        self._agent = agent
        self._side = None if side is None else SideDoor(agent.app, side)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, and the side door."""
        await super().startup(sockets)
        if self._side is not None:
            self._side.open()

    async def on_tick(self, counter: int) -> bool:
        """Uvicorn's, ten times a second; certificates are looked at every ten seconds."""
        if self.config.ssl is not None and counter % 100 == 0:
            self._certificates.renew(self.config.ssl)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, after the streams have been ended."""
        self._agent.hub.close()
        await super().shutdown(sockets)
        if self._side is not None:
            await self._side.stop()


def listen(settings: AgentSettings) -> socket.socket:
    """The socket that the agent will accept on, so that a taken port shows at once.

    Raises:
        InputError: The address cannot be listened on.
    """
    return _listen(settings.host, settings.port)


def listen_aside(settings: AgentSettings) -> socket.socket | None:
    """With TLS: the socket of the side door.

    Raises:
        InputError: The address cannot be listened on.
    """
    if settings.tls_cert is None:
        return None
    return _listen(settings.host if settings.probe_port else "127.0.0.1", settings.probe_port)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # asyncio sends without delay (TCP_NODELAY) only where the socket names its protocol;
        # elsewhere each answer waits some 40 ms for an acknowledgement
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error}",
            hint="is another agent running there? --port or --probe-port take another one",
        ) from error
    return sock


def serve(settings: AgentSettings) -> None:
    """Run an agent until SIGINT or SIGTERM.

    Raises:
        WeightSyncError: It could not start.
    """
    agent = Agent(settings, load_secret())
    agent.recall()
    with listen(settings) as sock, contextlib.ExitStack() as beside:
        side = listen_aside(settings)
        if side is not None:
            beside.enter_context(side)
        host, port = sock.getsockname()[:2]
        agent.listens_at(*(sock if side is None else side).getsockname()[:2])
        server = AgentServer(agent, side)
        scheme = "http" if side is None else "https"
        log.info("agent on %s://%s:%d for %s", scheme, host, port, ", ".join(settings.engine_url))
        if side is None and not is_loopback(host):
            log.warning("WITHOUT TLS on %s: whoever listens there can read the token", host)
        server.run(sockets=[sock])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.  Exit status 2: it could not start."""
    try:
        settings = load_settings(argv)
        log_to_stderr(settings.log_format, settings.log_level.upper())
        # one line a second for each look at the engine is no news
        logging.getLogger("httpx").setLevel(logging.WARNING)
        serve(settings)
    except WeightSyncError as error:
        sys.stderr.write(f"weightsync-agent: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
