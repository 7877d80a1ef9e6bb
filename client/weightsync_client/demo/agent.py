"""An agent, as the demo starts and asks it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from weightsync.errors import (
    DeadlineError,
    EngineError,
    ManifestError,
    RefusedError,
    TraceError,
    from_problem,
)
from weightsync_client.demo.processes import Deadline, Process, Processes

_POLL_S = 0.1
_CALL_S = 300.0
# asking again changes nothing about these
_HOPELESS = {TraceError.code, RefusedError.code, ManifestError.code}


class DemoAgent:
    """One agent.

    Args:
        name: In logs and messages.
        processes: Starts it.
        deadline: Of every wait.
    """

    def __init__(self, name: str, processes: Processes, deadline: Deadline) -> None:
        self._name = name
        self._processes = processes
        self._deadline = deadline
        self._port = processes.reserve_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.process: Process | None = None

    def start(self, engine_urls: Sequence[str]) -> None:
        """Start it; it finds the engines soon after they are up."""
        command = [sys.executable, "-m", "weightsync_server.agent.cli", "--port", str(self._port)]
        for url in engine_urls:
            command += ["--engine-url", url]
        command += ["--engine-poll-s", "0.25", "--attach-backoff-max-s", "1"]
        command += ["--journal", str(self._processes.logs / f"{self._name}.journal")]
        self.process = self._processes.start(self._name, command)

    def wait_ready(self, engines: Sequence[Process]) -> dict[str, Any]:
        """Wait until its admission gate opens; its status then.

        Args:
            engines: Processes that must not end meanwhile.

        Raises:
            EngineError: A process ended.
            RefusedError, TraceError, ManifestError: An engine cannot be attached to with the
                checkpoint that it serves.
            DeadlineError: The demo is out of time.
        """
        with self._http() as http:
            while True:
                for process in engines:
                    process.check()
                if self.process is not None:
                    self.process.check()
                left_s = min(5.0, self._deadline.left_s(f"the {self._name} and what is behind it"))
                try:
                    ready = http.get("/readyz", timeout=left_s).status_code == 200
                    status: dict[str, Any] = http.get("/status", timeout=left_s).json()
                except httpx.HTTPError:
                    time.sleep(_POLL_S)
                    continue
                if ready:
                    return status
                errors = status.get("last_errors", [])
                if errors and errors[-1]["code"] in _HOPELESS:
                    # what keeps it from attaching, as the workers put it
                    answer = http.post("/attach", json={}, timeout=self._call_s("/attach"))
                    raise from_problem(answer.json())
                time.sleep(_POLL_S)

    def is_ready(self) -> bool:
        """Whether its admission gate is open now."""
        with self._http() as http:
            return http.get("/readyz", timeout=self._call_s("/readyz")).status_code == 200

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every final kernel tensor, by name.

        Raises:
            WeightSyncError: What the agent answers instead.
        """
        timeout_s = self._call_s("/checksums")
        with self._http() as http:
            try:
                response = http.get("/checksums", timeout=timeout_s)
            except httpx.TimeoutException as error:
                raise DeadlineError(
                    f"the {self._name} did not answer /checksums in {timeout_s:g} s"
                ) from error
            except httpx.HTTPError as error:
                raise EngineError(f"the {self._name}'s /checksums failed: {error!r}") from error
        answer: dict[str, Any] = response.json()
        if response.status_code != 200:
            raise from_problem(answer)
        return {str(k): str(v) for k, v in answer["sha256"].items()}

    def _call_s(self, what: str) -> float:
        return min(_CALL_S, self._deadline.left_s(what))

    def _http(self) -> httpx.Client:
        # a proxy is for the internet, not for the loopback interface
        return httpx.Client(base_url=self.url, trust_env=False)
