"""The demo's end of the lines to its training job."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weightsync.errors import EngineError, from_problem
from weightsync_client.demo.processes import Deadline, Process, Processes

_POLL_S = 0.2
_EXIT_S = 20.0
_TELL_S = 30.0


class TrainerLink:
    """A running training job.  Every rank is told the same, rank 0 tells what happens.

    Args:
        processes: Starts it.
        config_file: The model's config; None: the demo's own.
        folder: Where it saves ``v0`` and ``trained``.
        agents: The addresses that it pushes to.
        device: Where it keeps the weights, ``cpu`` or ``cuda``.
        ranks: How many processes it has.
        deadline: Of every wait.
        quantization: ``fp8``: of checkpoints and pushes.
        trace: File for the time line of the last push.
        mode: Of every push.
    """

    def __init__(
        self,
        processes: Processes,
        config_file: Path | None,
        folder: Path,
        agents: Sequence[str],
        device: str,
        ranks: int,
        deadline: Deadline,
        quantization: str = "none",
        trace: Path | None = None,
        mode: str = "direct",
    ) -> None:
        command = [sys.executable, "-m", "weightsync_client.demo.trainer"]
        command += ["--folder", str(folder), "--device", device, "--quantization", quantization]
        command += ["--mode", mode]
        for agent in agents:
            command += ["--agent", agent]
        if config_file is not None:
            command += ["--config", str(config_file.resolve())]
        if trace is not None:
            command += ["--trace", str(trace.resolve())]
        port = processes.reserve_port()
        self._ranks: list[Process] = [
            processes.start(
                "trainer" if rank == 0 else f"trainer rank {rank}",
                command,
                torchrun_environ(rank, ranks, port),
                talks=True,
            )
            for rank in range(ranks)
        ]
        self._deadline = deadline
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="trainer-events", daemon=True).start()

    def tell(self, command: str) -> None:
        """Send one command to every rank.

        Raises:
            EngineError: A rank is gone.
        """
        for process in self._ranks:
            stdin = process.popen.stdin
            try:
                if stdin is not None:
                    stdin.write(command + "\n")
                    stdin.flush()
            except OSError:
                raise _gone(process) from None

    def until(self, last: str) -> Iterator[dict[str, Any]]:
        """Its events, up to and with the one of that name.

        Raises:
            WeightSyncError: What the trainer failed with.
            EngineError: It ended without a word.
            DeadlineError: The demo is out of time.
        """
        while True:
            event = self._next(last)
            if event["event"] == "failed":
                raise from_problem(event["problem"])
            yield event
            if event["event"] == last:
                return

    def wait(self, last: str) -> dict[str, Any]:
        """The event of that name; the others are dropped.  Raises as :meth:`until` does."""
        *_, event = self.until(last)
        return event

    def finish(self) -> None:
        """Let it release its memory and end.

        Raises:
            EngineError: It ended with an error.
            DeadlineError: It does not end.
        """
        for process in self._ranks:
            if process.popen.stdin is not None:
                process.popen.stdin.close()
        for process in self._ranks:
            process.wait(min(_EXIT_S, self._deadline.left_s("the trainer's end")))

    def _next(self, awaited: str) -> dict[str, Any]:
        dead_until: float | None = None
        while True:
            left_s = self._deadline.left_s(f"the trainer's {awaited!r}")
            try:
                event = self._events.get(timeout=min(_POLL_S, left_s))
            except queue.Empty:
                # a rank that is gone is rank 0's to tell, if it can
                dead = [process for process in self._ranks[1:] if process.exited]
                if dead and dead_until is None:
                    dead_until = time.monotonic() + _TELL_S
                if dead and dead_until is not None and time.monotonic() > dead_until:
                    raise _gone(dead[0]) from None
                continue
            if event is None:
                raise _gone(self._ranks[0])
            return event

    def _read(self) -> None:
        stdout = self._ranks[0].popen.stdout
        try:
            while stdout is not None and (line := stdout.readline()):
                self._events.put(json.loads(line))
        except ValueError:
            pass  # it was killed within a line, or the demo has closed the pipe
        self._events.put(None)


def _gone(process: Process) -> EngineError:
    return EngineError(f"the {process.name} ended unexpectedly\n{process.tail()}")


def torchrun_environ(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank of a job on this host, and that it stays on loopback."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
