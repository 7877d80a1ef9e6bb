"""The engine of a benchmark and the agent beside it."""

from __future__ import annotations

from pathlib import Path

from weightsync_client.demo.agent import DemoAgent
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Process, Processes, end_all
from weightsync_client.demo.stack import engine_command, engine_environ

_CONTEXT_TOKENS = 256


class Engine:
    """An engine that loads, or has loaded, a model.

    Args:
        name: In logs and messages.
        options: Which engine, and how it is split.
        model: Folder with its config, and its checkpoint, unless the weights are ``dummy``.
        processes: Starts it.
        deadline: Of every wait.
        dummy: Whether it makes its weights itself.
    """

    def __init__(
        self,
        name: str,
        options: DemoOptions,
        model: Path,
        processes: Processes,
        deadline: Deadline,
        *,
        dummy: bool = False,
    ) -> None:
        port = processes.reserve_port()
        command = engine_command(options, model, port, _CONTEXT_TOKENS)
        if dummy:
            command += ["--load-format", "dummy"]
        self._process: Process = processes.start(f"{name} engine", command, engine_environ(options))
        self._agent = DemoAgent(f"{name} agent", processes, deadline)
        self._agent.start([f"http://127.0.0.1:{port}"])

    @property
    def agents(self) -> list[str]:
        """Where to push to."""
        return [self._agent.url]

    def wait_ready(self) -> str:
        """Wait until it may be pushed to; its name and version.

        Raises:
            WeightSyncError: It cannot be.
        """
        engine = self._agent.wait_ready([self._process])["engines"][0]
        return f"{engine['name']} {engine['version']}"

    def stop(self) -> None:
        """End both, the agent first: it does not report a lost engine then."""
        agent = self._agent.process
        end_all([*([] if agent is None else [agent]), self._process])
