"""Whose turn it is: one count of an engine's pauses and resumes, whichever process hears them.

vLLM may have several API server processes (``--api-server-count``, by default one for each
data-parallel engine).  They share a port, so the agent's next call may reach another one than its
last, and what one of them hears late must be void at all of them (WS-1).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from weightsync.errors import DeadlineError, EngineError, StateError
from weightsync.process import lives_since

_POLL_S = 0.01
_PREFIX = "weightsync-turns"


class Turns:
    """The count, in this process or, where there are several, in a locked file.

    Args:
        parent: Pid of the process that started them; None: there is one.
        folder: For the file.
    """

    def __init__(self, parent: int | None = None, folder: Path | None = None) -> None:
        self._engine = uuid.uuid4().hex
        self._count = 0
        self._path: Path | None = None
        started = None if parent is None else lives_since(parent)
        if started is not None:
            folder = Path(tempfile.gettempdir()) if folder is None else folder
            self._engine = f"{parent}-{started}"
            self._path = folder / f"{_PREFIX}-{os.geteuid()}-{self._engine}"
            _tidy(folder)

    @contextlib.asynccontextmanager
    async def take(
        self, asked: str | None, timeout_s: float, *, last: bool = False
    ) -> AsyncIterator[str]:
        """Let a call have its turn; the next one's name.  Others wait until this is left.

        Args:
            asked: The turn that the caller believes it to be; None: whichever.
            timeout_s: How long another server process may have its turn.
            last: It is no turn of its own, but must come in the one of the last pause.

        Raises:
            StateError: It was sent before the last call was heard.
            DeadlineError: Another server process keeps its turn.
            EngineError: The count cannot be shared.
        """
        async with self._held(timeout_s) as fd:
            count = self._count if fd is None else int(os.pread(fd, 32, 0) or b"0")
            if asked is not None and asked != f"{self._engine}:{count}":
                raise StateError(
                    "the engine was paused or resumed after this was sent",
                    hint="ask is_paused, and decide again",
                )
            count += not last
            if fd is None:
                self._count = count
            else:
                os.pwrite(fd, str(count).encode(), 0)
            yield f"{self._engine}:{count}"

    @contextlib.asynccontextmanager
    async def _held(self, timeout_s: float) -> AsyncIterator[int | None]:
        if self._path is None:  # one process hears in order
            yield None
            return
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise EngineError(
                f"the engine's server processes cannot share {self._path}: {error}",
                hint="let them write there, or start vLLM with --api-server-count 1",
            ) from error
        try:
            deadline = time.monotonic() + timeout_s
            while not _locked(fd):
                if time.monotonic() > deadline:
                    raise DeadlineError(
                        f"another server process of the engine kept its turn for {timeout_s:g} s",
                        hint="look at the engine's log",
                    )
                await asyncio.sleep(_POLL_S)
            yield fd
        finally:
            os.close(fd)  # and the lock is gone, as when this process ends


def server_turns(processes: int) -> Turns:
    """The count of the engine that this process, one of so many, serves.

    Raises:
        EngineError: The others cannot be found.
    """
    if processes == 1:
        return Turns()
    parent = multiprocessing.parent_process()
    if parent is None or lives_since(parent.pid or 0) is None:
        raise EngineError(
            f"this is one of {processes} server processes of the engine, and which the others are "
            "is not known: none may start what another one has stopped",
            hint="start vLLM with --api-server-count 1",
        )
    return Turns(parent.pid)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tidy(folder: Path) -> None:
    """Remove what engines left that are over."""
    for path in folder.glob(f"{_PREFIX}-{os.geteuid()}-*-*"):
        pid, started = path.name.split("-")[-2:]
        if str(lives_since(int(pid))) != started:
            path.unlink(missing_ok=True)
