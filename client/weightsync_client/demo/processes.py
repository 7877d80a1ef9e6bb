"""The demo's processes: each in a group of its own, with a log, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from weightsync.errors import DeadlineError, EngineError

_GRACE_S = 10.0
_POLL_S = 0.05
_TAIL_LINES = 25


class Deadline:
    """The moment at which the whole command (``what``) is out of time (WS-6)."""

    def __init__(self, timeout_s: float, what: str = "demo") -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._at = time.monotonic() + timeout_s

    def left_s(self, what: str) -> float:
        """Seconds left for ``what``.

        Raises:
            DeadlineError: There are none.
        """
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"the {self._what} was not over after {self._timeout_s:g} s; "
                f"it was waiting for {what}",
                hint=f"see the logs in the {self._what}'s folder; --timeout gives it longer",
            )
        return left


class Process:
    """A started process and everything that it starts.  Its output goes to ``log``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        *,
        talks: bool,
    ) -> None:
        self.name = name
        self.log = log
        pipe = subprocess.PIPE if talks else None
        with log.open("wb") as out:
            # A group of its own: Ctrl-C reaches the demo alone, which then ends all in order.
            self.popen = subprocess.Popen(
                command,
                env=dict(environ),
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=pipe if talks else out,
                stderr=out,
                start_new_session=True,
                text=True,
            )

    @property
    def exited(self) -> bool:
        """Whether it is over.  It is not reaped: its group's number stays its own until the end."""
        if self.popen.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.popen.pid, flags) is not None

    def check(self) -> None:
        """Raises EngineError, with the end of its log, if it is over."""
        if self.exited:
            raise EngineError(f"{self.name} ended unexpectedly\n{self.tail()}")

    def wait(self, timeout_s: float) -> None:
        """Wait until it ends by itself.

        Raises:
            EngineError: Its exit status is not 0.
            DeadlineError: It does not end.
        """
        try:
            status = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DeadlineError(f"{self.name} did not end in {timeout_s:g} s") from None
        if status:
            raise EngineError(f"{self.name} ended with status {status}\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log."""
        text = self.log.read_text(errors="replace").rstrip()
        lines = text.splitlines()[-_TAIL_LINES:]
        return "\n".join([f"--- end of {self.log} ---", *(f"  {line}" for line in lines)])

    def signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        if self.popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)


def end_all(processes: Sequence[Process], grace_s: float = _GRACE_S) -> None:
    """Ask all to stop at once; after ``grace_s`` seconds nothing of their groups is left."""
    running = [p for p in processes if p.popen.returncode is None]
    try:
        for process in running:
            process.signal(signal.SIGTERM)
        until = time.monotonic() + grace_s
        while time.monotonic() < until and not all(p.exited for p in running):
            time.sleep(_POLL_S)
    finally:
        # also after an impatient second Ctrl-C; children that outlived their parent go too
        for process in running:
            process.signal(signal.SIGKILL)
        for process in running:
            process.popen.wait(_GRACE_S)
        for process in processes:
            for pipe in (process.popen.stdin, process.popen.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """A Ctrl-C or SIGTERM that comes meanwhile is heard at the end."""
    if threading.current_thread() is not threading.main_thread():  # it hears none
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in came:
            signal.raise_signal(late)


class Processes:
    """All processes of one demo: a context manager that ends them.

    Args:
        logs: Folder for their logs.
        environ: What they all see.
    """

    def __init__(self, logs: Path, environ: Mapping[str, str]) -> None:
        self.logs = logs
        self._environ = environ
        self._started: list[Process] = []
        self._ports: list[socket.socket] = []

    def reserve_port(self) -> int:
        """A port of the loopback interface that is given to nobody else until the end.

        It is bound but not listened on, so that whoever sets SO_REUSEADDR can listen there.
        """
        holder = socket.socket()
        self._ports.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])

    def start(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str] | None = None,
        *,
        talks: bool = False,
    ) -> Process:
        """Start one.  ``talks``: its standard input and output are pipes to the demo."""
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with _unbroken():  # one that was started and is not in the list would be left behind
            process = Process(name, command, {**self._environ, **(environ or {})}, log, talks=talks)
            self._started.append(process)
        return process

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        end_all(self._started)
        for holder in self._ports:
            holder.close()
