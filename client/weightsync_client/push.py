"""One push, from the look at the agents to the report, and the way back from a failure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from weightsync.errors import StaleVersionError, WeightSyncError
from weightsync.manifest import Manifest
from weightsync.protocol import PauseMode
from weightsync.transport.base import Transport
from weightsync_client.control import Fleet
from weightsync_client.progress import Progress
from weightsync_client.report import PHASES, AgentOutcome, PushReport
from weightsync_client.session import Session, open_session
from weightsync_client.settings import Deadlines
from weightsync_client.source import WeightSource
from weightsync_client.transaction import Transaction, describe


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What is the same in every push of a publisher; :class:`Publisher` tells the meanings."""

    make_transport: Callable[[], Transport]
    check_finite: bool
    pause_mode: PauseMode
    deadlines: Deadlines
    ignore: tuple[str, ...]
    progress: Progress


class Open:
    """What a publisher holds open from push to push.

    Attributes:
        fleet: The connections.
        session: The last rendezvous, while it may be used.
        last_version: The last version that a begin was sent for: it is not used again (WS-2).
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.session: Session | None = None
        self.last_version = 0

    def end_session(self) -> None:
        """Release the session's memory, handles and wire."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """End the session and the connections."""
        try:
            self.end_session()
        finally:
            self.fleet.close()


class Push:
    """One try at one push.

    Args:
        held: Taken over from the last push, and left to the next one.
        settings: The publisher's.
        source: The weights.
        manifest: Of that source.
        version: None: the next.
    """

    def __init__(
        self,
        held: Open,
        settings: PushSettings,
        source: WeightSource,
        manifest: Manifest,
        version: int | None,
    ) -> None:
        self._held = held
        self._settings = settings
        self._source = source
        self._manifest = manifest
        self._wanted = version
        self._version = 0 if version is None else version
        self._push_id = f"p-{uuid.uuid4().hex}"
        self._phase = "status"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._nbytes = 0
        self._transaction: Transaction | None = None
        self._started = time.perf_counter()

    @property
    def wrote_nothing(self) -> bool:
        """Whether it ended before the first write."""
        return self._phase not in {"write", "commit", "resume"}

    def run(self) -> PushReport:
        """All phases in order; on any failure the way back, then the error itself.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.publisher.Publisher.push`.
        """
        try:
            paused_s, agents = self._run()
        except BaseException as error:
            self._undo(error)
            raise
        report = PushReport(
            version=self._version,
            push_id=self._push_id,
            nbytes=self._nbytes,
            paused_s=paused_s,
            total_s=time.perf_counter() - self._started,
            agents=agents,
            **{f"{phase}_s": seconds for phase, seconds in self._seconds.items()},
        )
        self._settings.progress.done(report)
        return report

    def _run(self) -> tuple[float, tuple[AgentOutcome, ...]]:
        settings, deadlines = self._settings, self._settings.deadlines
        session = self._session()
        self._nbytes = session.nbytes
        with self._timed("fill"):
            digests = session.fill(self._source, check_finite=settings.check_finite)
        write_s = deadlines.for_bytes(deadlines.write_s, session.nbytes)
        commit_s = deadlines.for_bytes(deadlines.commit_s, session.nbytes)
        transaction = Transaction(
            self._held.fleet,
            session,
            push_id=self._push_id,
            version=self._version,
            deadlines=deadlines,
            pause_mode=settings.pause_mode,
        )
        self._transaction = transaction
        started = time.perf_counter()
        with self._timed("pause"):
            transaction.pause()
        self._held.last_version = self._version
        with self._timed("begin"):
            transaction.begin()
        with self._timed("write"):
            session.write(self._version, timeout_s=write_s)
        with self._timed("commit"):
            transaction.commit(digests, timeout_s=commit_s)
        with self._timed("resume"):
            agents = transaction.resume()
        return time.perf_counter() - started, agents

    def _session(self) -> Session:
        """The last session if it still holds at every agent, else a new one."""
        held, settings = self._held, self._settings
        statuses = fleet_status(held.fleet, settings.deadlines)
        self._choose_version(statuses)
        session = held.session
        if session is not None and session.manifest == self._manifest and session.holds(statuses):
            return session
        held.end_session()
        with self._timed("rendezvous"):
            held.session = open_session(
                held.fleet,
                self._source,
                self._manifest,
                make_transport=settings.make_transport,
                deadlines=settings.deadlines,
                ignore=settings.ignore,
            )
        return held.session

    def _choose_version(self, statuses: Sequence[dict[str, Any]]) -> None:
        versions = [int(s.get("version") or 0) for s in statuses]
        # a torn engine may tell which version was interrupted
        targets = [int(s.get("target") or 0) for s in statuses]
        lowest = max(*versions, *targets, self._held.last_version) + 1
        if self._wanted is None:
            self._version = lowest
        elif self._wanted <= max(versions):
            # The agents would refuse it too, but only after the fill and the pause.
            raise StaleVersionError(
                f"version {self._wanted} is not newer than what an engine has: {max(versions)}",
                hint=f"push version {lowest} or later, or leave the version out",
                lowest=lowest,
            )

    def _undo(self, error: BaseException) -> None:
        """Abort at every agent, drop what may be in flight, tell the error what became of all."""
        elapsed_s = time.perf_counter() - self._started
        transaction = self._transaction
        fates = [] if transaction is None else transaction.fates()
        try:
            if transaction is not None:
                for failure in transaction.abort(f"{self._phase}: {describe(error)}"):
                    error.add_note(f"the abort failed too: {failure}")
        finally:
            began = transaction is not None and transaction.began
            if began:  # writes may be in flight: nothing of this epoch is used again (WS-3, WS-8)
                try:
                    self._held.end_session()
                except WeightSyncError as also:
                    error.add_note(f"closing the session failed too: {also}")
            if isinstance(error, WeightSyncError):
                error.context.update(
                    phase=self._phase,
                    version=self._version,
                    push_id=self._push_id,
                    elapsed_s=elapsed_s,
                    agents=fates,
                )
            what_now = (
                f"{'; '.join(fates)}. A torn engine serves nothing until a whole push follows: "
                "remove the cause and call push again"
                if began
                else "nothing was written, every engine has the weights that it had"
            )
            error.add_note(
                f"push {self._push_id} of version {self._version} failed in phase {self._phase} "
                f"after {elapsed_s:.3f} s; {what_now}"
            )
            self._settings.progress.failed(self._phase, self._version, self._push_id, error)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        progress = self._settings.progress
        self._phase = phase
        progress.started(phase, self._version)
        started = time.perf_counter()
        yield
        seconds = self._seconds[phase] = time.perf_counter() - started
        progress.ended(phase, self._version, self._push_id, seconds, self._nbytes)


def fleet_status(fleet: Fleet, deadlines: Deadlines) -> list[dict[str, Any]]:
    """Every agent's ``GET /status``, in the fleet's order.

    Raises:
        AgentUnreachableError: One does not answer.
    """
    return fleet.each(lambda agent: agent.get("/status", timeout_s=deadlines.status_s))
