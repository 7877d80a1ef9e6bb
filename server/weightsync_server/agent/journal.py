"""What an agent remembers on disk, so that its restart is no news to anybody.

A small file, written whole: to a neighbour first, then put in its place, so that a crash at any
moment leaves the old record or the new one.  It tells what was under way; what the engine holds
the workers know better, and are asked.

While a push holds the engine nothing is synced, for that would take milliseconds of its pause: what
is written survives the process, and a host that dies takes the engine along.  Between pushes it is.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from weightsync.errors import InputError, JournalError
from weightsync.process import Writer
from weightsync.state import AgentState

log = logging.getLogger(__name__)

_MAGIC = "weightsync-journal-1"
#: pushes whose answers are kept
_KEPT_PUSHES = 4


class Remembered(BaseModel):
    """What one call of a push was asked and answered; ``problem`` instead of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: str
    answer: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None


class FencedPush(BaseModel):
    """A push that ended without its writers' word that nothing of it is on its way any more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    push_id: str
    writers: tuple[Writer, ...]


class Record(BaseModel):
    """Everything that outlives the agent's process.

    Attributes:
        state: As it was, or as it was about to become.
        session_owner: Whose the open session is, as :class:`SessionGuard` tells it apart.
        instances: The worker process at each place.
        writers: The processes that write in the open epoch.
        fenced: Pushes whose late writes must be kept out.
        answers: By push and call, the newest push last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: AgentState = AgentState()
    session_owner: str = ""
    instances: dict[str, str] = {}
    writers: tuple[Writer, ...] = ()
    fenced: tuple[FencedPush, ...] = ()
    answers: dict[str, dict[str, Remembered]] = {}

    def with_answer(self, push_id: str, call: str, answer: Remembered) -> Record:
        """The same, with one answer more; those of old pushes are forgotten."""
        others = {p: calls for p, calls in self.answers.items() if p != push_id}
        kept = dict(list(others.items())[1 - _KEPT_PUSHES :])
        kept[push_id] = self.answers.get(push_id, {}) | {call: answer}
        return self.model_copy(update={"answers": kept})


def default_path(engine_urls: Sequence[str], environ: Mapping[str, str] = os.environ) -> Path:
    """Where the journal of these engines' agent is, if nobody says otherwise."""
    state = environ.get("XDG_STATE_HOME")
    folder = Path(state) if state else Path.home() / ".local" / "state"
    name = hashlib.sha256(" ".join(sorted(engine_urls)).encode()).hexdigest()[:16]
    return folder / "weightsync" / f"agent-{name}.journal"


class Journal:
    """One agent's journal.  Used on the event loop only; files are written off it.

    Args:
        path: The file; its folder is made.
        failed: Told each time that it could not be written.
    """

    def __init__(self, path: Path, failed: Callable[[JournalError], None]) -> None:
        self.path = path
        self.record = Record()
        #: why it cannot be relied on; empty: it can
        self.trouble = ""
        self._failed = failed
        self._written = self.record
        self._lock_fd = -1
        self._turn = asyncio.Lock()
        self._soon: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Take the journal and read it; the second time nothing.

        A journal that is damaged is set aside, for a person to look at, and a new one begun.  One
        that cannot be read or written is no reason not to start: the agent refuses pushes.

        Raises:
            InputError: Another agent has it.
        """
        if self._lock_fd >= 0:
            return
        try:
            self._take()
            self.record = self._written = self._read()
        except BlockingIOError as error:
            raise InputError(
                f"another agent has the journal {self.path}",
                hint="one agent for one engine; --journal gives a second one a file of its own",
            ) from error
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        """Leave the journal to the next agent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def save(self, record: Record) -> None:
        """Write ``record``; an agent that starts after this has returned reads it.

        Raises:
            JournalError: It is not.
        """
        self.record = record
        async with self._turn:
            if self._written == self.record and not self.trouble:
                return
            writing = self.record
            try:
                await asyncio.to_thread(self._write, writing)
            except OSError as error:
                raise self._tell(error) from error
            self._written, self.trouble = writing, ""

    def save_soon(self, record: Record) -> None:
        """Write ``record`` meanwhile: for what the workers would tell a new agent, too."""
        if record == self.record:
            return
        self.record = record
        if self._soon is None or self._soon.done():
            self._soon = asyncio.create_task(self._catch_up())

    def retry(self) -> None:
        """Try again what failed: somebody may have mended the disk."""
        if self.trouble and (self._soon is None or self._soon.done()):
            self._soon = asyncio.create_task(self._catch_up())

    async def flush(self) -> None:
        """Return when nothing is left to be written, or it could not be."""
        if self._soon is not None:
            await asyncio.gather(self._soon, return_exceptions=True)

    async def _catch_up(self) -> None:
        try:
            while self.trouble or self._written != self.record:
                await self.save(self.record)
        except JournalError:
            pass  # told; whoever depends on it saves by himself

    def _tell(self, error: OSError) -> JournalError:
        told = JournalError(
            f"the journal {self.path} cannot be written: {error.strerror or error}",
            hint="free the disk, or give the agent a --journal that it may write; "
            "no push is taken meanwhile",
        )
        self.trouble = told.message
        self._failed(told)
        return told

    def _take(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # a file of its own: the journal is another file after each write
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        self._lock_fd = lock

    def _read(self) -> Record:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return Record()
        head, _, body = raw.partition(b"\n")
        try:
            if head.decode() != _head(body):
                raise ValueError("its checksum is wrong")
            return Record.model_validate_json(body)
        except (ValueError, ValidationError) as error:
            aside = self.path.with_name(self.path.name + ".damaged")
            self.path.replace(aside)
            reason = str(error).splitlines()[0]
            self._failed(
                JournalError(
                    f"the journal {self.path} is damaged: {reason}",
                    hint=f"it is kept as {aside}; what the workers hold is known all the same, "
                    "but not which versions were pushed before the engine started",
                )
            )
            return Record()

    def _write(self, record: Record) -> None:
        if self._lock_fd < 0:
            self._take()  # what was wrong at the start may be mended
        sync = record.state.owner is None
        body = record.model_dump_json(exclude_defaults=True).encode()
        draft = self.path.with_name(self.path.name + ".new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_head(body).encode() + b"\n" + body)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        draft.replace(self.path)
        if sync:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _head(body: bytes) -> str:
    return f"{_MAGIC} {zlib.crc32(body):08x}"
