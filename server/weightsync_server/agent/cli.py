"""``weightsync-agent``: the command."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from weightsync.errors import InputError, WeightSyncError
from weightsync.logs import formatter
from weightsync_server.agent.app import Agent
from weightsync_server.agent.settings import AgentSettings, load_settings
from weightsync_server.secret import load_secret

log = logging.getLogger("weightsync_server.agent")


class AgentServer(uvicorn.Server):
    """Ends the event streams first when it is told to stop; they would never end by themselves."""

    def __init__(self, agent: Agent) -> None:
        settings = agent.settings
        super().__init__(
            uvicorn.Config(
                agent.app,
                log_config=None,
                access_log=settings.log_level == "debug",
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
            )
        )
        self._agent = agent

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, after the streams have been ended."""
        self._agent.hub.close()
        await super().shutdown(sockets)


def listen(settings: AgentSettings) -> socket.socket:
    """The socket that the agent will accept on, so that a taken port shows at once.

    Raises:
        InputError: The address cannot be listened on.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
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
            f"cannot listen on {settings.host} port {settings.port}: {error}",
            hint="is another agent running there? --port takes another one",
        ) from error
    return sock


def serve(settings: AgentSettings) -> None:
    """Run an agent until SIGINT or SIGTERM.

    Raises:
        WeightSyncError: It could not start.
    """
    agent = Agent(settings, load_secret())
    with listen(settings) as sock:
        host, port = sock.getsockname()[:2]
        agent.listens_at(host, port)
        log.info("agent on http://%s:%d for %s", host, port, ", ".join(settings.engine_url))
        AgentServer(agent).run(sockets=[sock])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.  Exit status 2: it could not start."""
    try:
        settings = load_settings(argv)
        handler = logging.StreamHandler()
        handler.setFormatter(formatter(settings.log_format))
        logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
        # one line a second for each look at the engine is no news
        logging.getLogger("httpx").setLevel(logging.WARNING)
        serve(settings)
    except WeightSyncError as error:
        sys.stderr.write(f"weightsync-agent: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
