"""One process of a benchmark, at the benchmark's end: see :func:`weightsync.lines.serve`."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from weightsync.errors import DeadlineError, EngineError, WeightSyncError, from_problem
from weightsync_client.demo.processes import Deadline, Process, Processes, end_all

_POLL_S = 0.5
_EXIT_S = 20.0


class Part:
    """One process of a benchmark.

    Args:
        processes: Starts it.
        name: In logs and messages.
        command: Its command line.
        deadline: Of every wait.
        environ: What it sees beside what all see.
    """

    def __init__(
        self,
        processes: Processes,
        name: str,
        command: Sequence[str],
        deadline: Deadline,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.process: Process = processes.start(name, command, environ, talks=True)
        self._deadline = deadline
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"{name}-answers", daemon=True).start()

    def tell(self, command: str, **facts: Any) -> None:
        """Send one command; :meth:`answer` waits for what it answers.

        Raises:
            EngineError: It is gone.
        """
        stdin = self.process.popen.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps({"command": command, **facts}) + "\n")
                stdin.flush()
        except (OSError, ValueError):
            raise self._gone() from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Its next answer.  A process that does not answer in time is ended.

        Raises:
            WeightSyncError: What the command failed with.
            EngineError: It is gone.
            DeadlineError: It did not answer, or the benchmark is out of time.
        """
        waited_s = 0.0
        while True:
            step_s = min(_POLL_S, self._deadline.left_s(f"the {self.process.name}"))
            try:
                answer = self._answers.get(timeout=step_s)
                break
            except queue.Empty:
                waited_s += step_s
                if waited_s >= timeout_s:
                    end_all([self.process], grace_s=1.0)
                    raise DeadlineError(
                        f"the {self.process.name} did not answer in {timeout_s:g} s\n"
                        f"{self.process.tail()}"
                    ) from None
        if answer is None:
            raise self._gone()
        if "problem" in answer:
            raise from_problem(answer["problem"])
        return answer

    def ask(self, command: str, *, timeout_s: float, **facts: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.  Raises as :meth:`answer` does."""
        self.tell(command, **facts)
        return self.answer(timeout_s)

    def finish(self) -> None:
        """Let it release its memory and end, or end it."""
        if self.process.popen.stdin is not None:
            with contextlib.suppress(OSError):  # it is gone, with a command unread
                self.process.popen.stdin.close()
        try:
            self.process.wait(_EXIT_S)
        except WeightSyncError:
            end_all([self.process])

    def _gone(self) -> EngineError:
        return EngineError(f"the {self.process.name} ended unexpectedly\n{self.process.tail()}")

    def _read(self) -> None:
        stdout = self.process.popen.stdout
        try:
            while stdout is not None and (line := stdout.readline()):
                self._answers.put(json.loads(line))
        except ValueError:
            pass  # it was killed within a line, or the benchmark has closed the pipe
        self._answers.put(None)


class Job:
    """Processes that are told the same at the same time, as the ranks of a training job.

    Args:
        parts: The processes; what the first one answers counts.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def ask(self, command: str, *, timeout_s: float, **facts: Any) -> dict[str, Any]:
        """Send all of them a command, and wait for every answer.  Raises as Part.answer does."""
        for part in self._parts:
            part.tell(command, **facts)
        first, *_ = [part.answer(timeout_s) for part in self._parts]
        return first

    def finish(self) -> None:
        """Let all release their memory and end, or end them."""
        for part in self._parts:
            part.finish()
