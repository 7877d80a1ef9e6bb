"""What an agent remembers on disk, so that its restart is no news to anybody.

A crash at any moment leaves the old record or the new one.  It tells what was under way; what the
engine holds the workers know better, and are asked.

While a push holds the engine only what is new is added, at once and without syncing it, for the
milliseconds of that would be its pause's: what is written survives the process, and a host that
dies takes the engine along.  Between pushes the record is written whole, and synced.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from weightsync.errors import InputError, JournalError
from weightsync.process import Writer
from weightsync.state import AgentState
from weightsync_server.agent.record_log import RecordLog

T = TypeVar("T")

#: pushes whose answers are kept
_KEPT_PUSHES = 4
#: :meth:`Record.since` of the same record
_NOTHING = b"{}"
#: seconds in which what need not be written at once gathers, so that no step of a push waits for it
_SOON_S = 0.002


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
        calls = self.answers.get(push_id, {}) | {call: answer}
        return self.model_copy(update={"answers": _newest(self.answers, push_id, calls)})

    def since(self, before: Record) -> bytes:
        """What is new in it, as JSON: fields whole, of the answers those of pushes that got one.

        Answers are only ever added, by :meth:`with_answer`: which it forgets is not told.
        """
        new: dict[str, Any] = {
            name: True
            for name in Record.model_fields
            if getattr(self, name) != getattr(before, name)
        }
        if "answers" in new:
            new["answers"] = {p for p, c in self.answers.items() if before.answers.get(p) != c}
        return self.model_dump_json(include=new).encode()

    @staticmethod
    def of(parts: Iterable[bytes]) -> Record:
        """Put together what :meth:`since` told, the oldest first.

        Raises:
            ValueError: It makes no record.
        """
        fields: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        for part in parts:
            new = json.loads(part)
            for push_id, calls in new.pop("answers", {}).items():
                answers = _newest(answers, push_id, calls)
            fields |= new
        return Record.model_validate(fields | {"answers": answers})


def _newest(answers: dict[str, T], push_id: str, calls: T) -> dict[str, T]:
    others = {p: c for p, c in answers.items() if p != push_id}
    return dict(list(others.items())[1 - _KEPT_PUSHES :]) | {push_id: calls}


def default_path(engine_urls: Sequence[str], environ: Mapping[str, str] = os.environ) -> Path:
    """Where the journal of these engines' agent is, if nobody says otherwise."""
    state = environ.get("XDG_STATE_HOME")
    folder = Path(state) if state else Path.home() / ".local" / "state"
    name = hashlib.sha256(" ".join(sorted(engine_urls)).encode()).hexdigest()[:16]
    return folder / "weightsync" / f"agent-{name}.journal"


class Journal:
    """One agent's journal.  Used on the event loop only; what takes long is done off it.

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
        self._log = RecordLog(path)
        # what the file tells; whether it was written whole, and synced, and nothing added since
        self._told = self.record
        self._whole = True
        self._lock_fd = -1
        self._writing: asyncio.Task[JournalError | None] | None = None
        self._soon: asyncio.TimerHandle | None = None

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
            self.record = self._told = self._read()
        except BlockingIOError as error:
            raise InputError(
                f"another agent has the journal {self.path}",
                hint="one agent for one engine; --journal gives a second one a file of its own",
            ) from error
        except OSError as error:
            self._tell(error)

    def close(self) -> None:
        """Leave the journal to the next agent; what has to be in it was flushed."""
        if self._soon is not None:
            self._soon.cancel()
        self._log.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def save(self, record: Record) -> None:
        """Write ``record``; an agent that starts after this has returned reads it.

        Raises:
            JournalError: It is not.
        """
        before, self.record = self.record, record
        while not self._saved():
            # who gives up waiting does not stop it: two threads would write
            if error := await asyncio.shield(self._write()):
                if self.record is record:
                    self.record = before
                raise error

    def save_soon(self, record: Record) -> None:
        """Write ``record`` in a moment: for what the workers would tell a new agent, too."""
        self.record = record
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(_SOON_S, self._catch_up)

    def retry(self) -> None:
        """Try again what failed: somebody may have mended the disk."""
        if self.trouble:
            self._write()

    async def flush(self) -> None:
        """Return when nothing is left to be written, or it could not be."""
        self._catch_up()
        if self._writing is not None:
            await asyncio.wait([self._writing])

    def _catch_up(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if not self._saved():
            self._write()

    def _saved(self) -> bool:
        """Whether the record is as safe as it has to be; it is made so if that takes no time."""
        if self.trouble:
            return False
        # between pushes, too: nothing that was answered is forgotten until it is written whole
        if (new := self.record.since(self._told)) != _NOTHING:
            if not self._log.add(new):
                return False
            self._told, self._whole = self.record, False
        return self._whole or self.record.state.owner is not None

    def _write(self) -> asyncio.Task[JournalError | None]:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_whole())
        return self._writing

    async def _write_whole(self) -> JournalError | None:
        """Write the record whole until it is saved; meanwhile it may be added to, as ever.

        Returns:
            Why it could not be written.
        """
        while True:
            record, sync = self.record, self.record.state.owner is None
            try:
                draft = await asyncio.to_thread(self._draft, record, sync=sync)
                new = self.record.since(record)
                self._log.begin(draft, [] if new == _NOTHING else [new])
                self._told, self._whole = record if new == _NOTHING else self.record, False
                if sync:
                    await asyncio.to_thread(self._log.sync_folder)
            except OSError as error:
                return self._tell(error)
            self._whole = sync and self._told is record
            self.trouble = ""
            if self._saved():
                return None

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
        # a file of its own: the journal is another file each time that it is written whole
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        self._lock_fd = lock

    def _read(self) -> Record:
        try:
            return Record.of(self._log.read())
        except ValueError as error:
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

    def _draft(self, record: Record, *, sync: bool) -> int:
        if self._lock_fd < 0:
            self._take()  # what was wrong at the start may be mended
        return self._log.draft(record.since(Record()), sync=sync)
