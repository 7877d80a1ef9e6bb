"""The demo's end of the lines to its trainer process."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightsync.errors import EngineError, from_problem
from weightsync_client.demo.processes import Deadline, Process, Processes

_POLL_S = 0.2
_EXIT_S = 20.0


class TrainerLink:
    """A running trainer.

    Args:
        processes: Starts it.
        config_file: The model's config; None: the demo's own.
        folder: Where it saves ``v0`` and ``trained``.
        agent: The address that it pushes to.
        device: Where it keeps the weights, ``cpu`` or ``cuda``.
        deadline: Of every wait.
    """

    def __init__(
        self,
        processes: Processes,
        config_file: Path | None,
        folder: Path,
        agent: str,
        device: str,
        deadline: Deadline,
    ) -> None:
        command = [sys.executable, "-m", "weightsync_client.demo.trainer"]
        command += ["--folder", str(folder), "--agent", agent, "--device", device]
        if config_file is not None:
            command += ["--config", str(config_file.resolve())]
        self.process: Process = processes.start("trainer", command, talks=True)
        self._deadline = deadline
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="trainer-events", daemon=True).start()

    def tell(self, command: str) -> None:
        """Send one command.

        Raises:
            EngineError: The trainer is gone.
        """
        stdin = self.process.popen.stdin
        try:
            if stdin is not None:
                stdin.write(command + "\n")
                stdin.flush()
        except OSError:
            raise self._gone() from None

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
        if self.process.popen.stdin is not None:
            self.process.popen.stdin.close()
        left_s = min(_EXIT_S, self._deadline.left_s("the trainer's end"))
        self.process.wait(left_s)

    def _next(self, awaited: str) -> dict[str, Any]:
        while True:
            left_s = self._deadline.left_s(f"the trainer's {awaited!r}")
            try:
                event = self._events.get(timeout=min(_POLL_S, left_s))
            except queue.Empty:
                continue
            if event is None:
                raise self._gone()
            return event

    def _gone(self) -> EngineError:
        return EngineError(f"the trainer ended unexpectedly\n{self.process.tail()}")

    def _read(self) -> None:
        stdout = self.process.popen.stdout
        try:
            while stdout is not None and (line := stdout.readline()):
                self._events.put(json.loads(line))
        except ValueError:
            pass  # it was killed within a line, or the demo has closed the pipe
        self._events.put(None)
