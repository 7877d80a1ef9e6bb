"""One push, from the look at the agents to the report, and the way back from a failure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from weightsync.errors import InputError, NoSessionError, StaleVersionError, WeightSyncError
from weightsync.protocol import RankDigests
from weightsync_client.control import Fleet
from weightsync_client.lending import Lending
from weightsync_client.opened import Open, PushSettings
from weightsync_client.quantized import Findings, merge
from weightsync_client.rendezvous import Pushed, open_session
from weightsync_client.report import PHASES, PushReport
from weightsync_client.session import Session
from weightsync_client.settings import Deadlines
from weightsync_client.source import WeightSource
from weightsync_client.trace import Mark, Recorder
from weightsync_client.transaction import Transaction, check_held, describe

T = TypeVar("T")
R = TypeVar("R")

#: a push is not given up by its agents, nor by rank 0, so soon after the slots were filled
_FOLLOWER_FRESH_S = 20.0


@dataclass(frozen=True)
class _Hello:
    """What a rank comes with: the session that it could use again, and the version it was told."""

    session: str
    wanted: int | None


@dataclass(frozen=True)
class _Start:
    """What a push starts with; ``fresh``: a new rendezvous comes first."""

    version: int
    push_id: str
    fresh: bool


class Push:
    """One try at one push, on one rank.  What speaks to agents runs on rank 0 alone.

    Args:
        held: Taken over from the last push, and left to the next one.
        settings: The publisher's.
        pushed: The weights.
        version: None: the next.
    """

    def __init__(
        self, held: Open, settings: PushSettings, pushed: Pushed, version: int | None
    ) -> None:
        self._held = held
        self._settings = settings
        self._pushed = pushed
        self._wanted = version
        self._version = 0 if version is None else version
        self._push_id = f"p-{uuid.uuid4().hex}"
        self._phase = ""
        self._phase_started = 0.0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._paused_at = 0.0
        self._filled_at = 0.0
        self._filled_from: WeightSource
        self._transaction: Transaction | None = None
        self._undone = False
        self.wrote_nothing = True
        self._recorder = Recorder()
        self._told: list[list[Mark]] = []
        self._started = self._recorder.zero

    def run(self) -> PushReport:
        """All phases in order; on any failure the way back, then the error itself.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.publisher.Publisher.push`.
        """
        held, settings, deadlines = self._held, self._settings, self._settings.deadlines
        try:
            start = self._meet(
                "status", self._hello, self._start, kind=_Hello, result=_Start,
                decide_s=deadlines.status_s + deadlines.grace_s,
            )  # fmt: skip
            self._version, self._push_id = start.version, start.push_id
            self._share_scales()
            if start.fresh:
                self._enter("rendezvous")
                held.end_session()
                held.session = open_session(
                    held.fleet,
                    held.ranks,
                    self._pushed,
                    make_transport=settings.make_transport,
                    deadlines=deadlines,
                    ignore=settings.ignore,
                    max_slot_nbytes=settings.max_slot_nbytes,
                    coalesce_nbytes=settings.coalesce_nbytes,
                    lending=Lending(settings.lend_nbytes, frozenset(held.moved)),
                    undo=self._undo,
                )
            session = held.session
            if session is None:
                raise NoSessionError("the session ended", hint="push again")
            self._enter("fill")
            exchange_s = 0.0
            if (gather := session.gather) is not None:
                # A meeting of its own: no rank takes part in an exchange that another has left.
                exchange_s = deadlines.for_bytes(deadlines.write_s, gather.nbytes)
                self._meet(
                    "gather", lambda: gather.pack(self._pushed.source), lambda _: None,
                    kind=None, result=None, work_s=exchange_s, decide_s=0.0,
                )  # fmt: skip
            self._meet(
                "fill",
                lambda: self._fill(session, exchange_s),
                lambda digests: self._pause_and_begin(session, digests),
                kind=list[list[str]], result=None,
                work_s=exchange_s + deadlines.for_bytes(deadlines.write_s, session.nbytes),
                decide_s=deadlines.pause_s + deadlines.begin_s + 2 * deadlines.grace_s,
            )  # fmt: skip
            if held.ranks.rank:
                self._recorder.anchor = time.perf_counter()
            held.last_version = self._version
            # From here on another rank may have written, whatever becomes of this one.
            self.wrote_nothing = False
            write_s = deadlines.for_bytes(deadlines.write_s, session.nbytes)
            commit_s = deadlines.for_bytes(deadlines.commit_s, session.job.nbytes)
            report = self._meet(
                "write",
                lambda: self._write(session, write_s),
                lambda told: self._commit_and_resume(session, commit_s, told),
                kind=list[Mark], result=PushReport, work_s=write_s,
                decide_s=commit_s + deadlines.resume_s + 2 * deadlines.grace_s,
            )  # fmt: skip
        except BaseException as error:
            self._leave(error)
            raise
        if held.ranks.rank == 0:
            report = replace(report, spans=self._recorder.timeline(self._told))
        settings.progress.done(report)
        if start.fresh:  # the first write of an epoch tells whether it took the right wire
            session.warn_if_slow(held.ranks.world_size)
        return report

    def _share_scales(self) -> None:
        """Agree on the scales of blocks that lie on several ranks."""
        if (quantized := self._pushed.quantized) is None:
            return
        self._enter("scales")
        deadlines = self._settings.deadlines
        merged = self._meet(
            "scales", quantized.findings, merge, kind=Findings, result=dict[str, bytes],
            work_s=deadlines.for_bytes(deadlines.write_s, quantized.cut_nbytes),
            decide_s=deadlines.for_bytes(deadlines.grace_s, quantized.cut_nbytes),
        )  # fmt: skip
        quantized.learn(merged)

    def _hello(self) -> _Hello:
        session, declaration = self._held.session, self._pushed.declaration
        if session is None or session.declaration != declaration:
            return _Hello("", self._wanted)
        if moved := session.slots.moved(self._pushed.source):
            # what is registered is not what the trainer has now (WS-9)
            self._held.moved |= moved
            return _Hello("", self._wanted)
        return _Hello(session.id, self._wanted)

    def _start(self, hellos: Sequence[_Hello]) -> _Start:
        wanted = {hello.wanted for hello in hellos}
        if len(wanted) > 1:
            raise InputError(
                f"the ranks push different versions: {wanted}",
                hint="hand the same version to push on every rank, or none",
            )
        self._enter("status")
        statuses = fleet_status(self._held.fleet, self._settings.deadlines)
        self._choose_version(statuses)
        session = self._held.session
        holds = (
            session is not None
            and {hello.session for hello in hellos} == {session.id}
            and session.holds(statuses)
        )
        return _Start(self._version, self._push_id, not holds)

    def _pause_and_begin(self, session: Session, digests: list[list[list[str]]]) -> None:
        self._transaction = transaction = Transaction(
            self._held.fleet,
            session,
            [
                [RankDigests(rank=r, digests=of_rank[a.index]) for r, of_rank in enumerate(digests)]
                for a in self._held.fleet.agents
            ],
            push_id=self._push_id,
            version=self._version,
            deadlines=self._settings.deadlines,
            pause_mode=self._settings.pause_mode,
            recorder=self._recorder,
        )
        self._enter("pause")
        transaction.pause()
        self._held.last_version = self._version
        self._enter("begin")
        transaction.begin()
        self._enter("write")
        self._recorder.anchor = time.perf_counter()

    def _fill(self, session: Session, exchange_s: float) -> list[list[str]]:
        source = self._pushed.source
        if session.gather is not None:
            with self._recorder.during("gather"):
                source = session.gather.exchange(self._held.ranks, source, timeout_s=exchange_s)
        self._filled_from = source
        with self._recorder.during("fill"):
            digests = session.fill(source, check_finite=self._settings.check_finite)
        self._filled_at = time.monotonic()
        return digests

    def _write(self, session: Session, timeout_s: float) -> list[Mark]:
        if self._transaction is not None:
            self._transaction.check_held()
        else:  # not rank 0, and the word to write may have lain here while this rank stood still
            check_held(
                self._held.fleet,
                self._push_id,
                self._settings.deadlines,
                heard_at=self._filled_at,
                fresh_s=_FOLLOWER_FRESH_S,
            )
        with self._recorder.during("write"):
            session.write(self._version, self._filled_from, timeout_s=timeout_s)
        self._recorder.writes(session.written())
        return self._recorder.told() if self._held.ranks.rank else []

    def _commit_and_resume(
        self, session: Session, commit_s: float, told: list[list[Mark]]
    ) -> PushReport:
        self._told = told
        transaction = self._transaction
        if transaction is None:
            raise NoSessionError("no push was begun", hint="push again")
        self._enter("commit")
        transaction.commit(timeout_s=commit_s)
        self._enter("resume")
        agents = transaction.resume()
        self._enter("")
        now = time.perf_counter()
        return PushReport(
            version=self._version,
            push_id=self._push_id,
            nbytes=session.job.nbytes,
            rounds=session.job.rounds,
            paused_s=now - self._paused_at,
            total_s=now - self._started,
            agents=agents,
            spans=(),
            **{f"{phase}_s": seconds for phase, seconds in self._seconds.items()},
        )

    def _meet(
        self,
        phase: str,
        work: Callable[[], T],
        decide: Callable[[list[T]], R],
        *,
        kind: Any,
        result: Any,
        work_s: float = 0.0,
        decide_s: float,
    ) -> R:
        # rank 0 may have to abort before it answers
        decide_s += self._settings.deadlines.abort_s + self._settings.deadlines.grace_s
        return self._held.ranks.meet(
            phase, work, decide, kind=kind, result=result, work_s=work_s, decide_s=decide_s,
            undo=self._undo,
        )  # fmt: skip

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
        """On rank 0: abort at every agent, and tell the error what became of all."""
        self._undone = True
        elapsed_s = time.perf_counter() - self._started
        transaction = self._transaction
        fates = [] if transaction is None else transaction.fates()
        if transaction is not None:
            for failure in transaction.abort(f"{self._phase}: {describe(error)}"):
                error.add_note(f"the abort failed too: {failure}")
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
            if transaction is not None and transaction.began
            else "nothing was written, every engine has the weights that it had"
        )
        error.add_note(
            f"push {self._push_id} of version {self._version} failed in phase {self._phase} "
            f"after {elapsed_s:.3f} s; {what_now}"
        )

    def _leave(self, error: BaseException) -> None:
        """On every rank, whatever failed and wherever: drop what may be in flight."""
        try:
            if self._held.ranks.rank == 0 and not self._undone:
                self._undo(error)
        finally:
            began = self._transaction is not None and self._transaction.began
            if began or not self.wrote_nothing:
                # Writes may be in flight: nothing of this epoch is used again (WS-3, WS-8).
                try:
                    self._held.end_session()
                except WeightSyncError as also:
                    error.add_note(f"closing the session failed too: {also}")
            self._settings.progress.failed(self._phase, self._version, self._push_id, error)

    def _enter(self, phase: str) -> None:
        """End the phase that runs, and start the next."""
        progress, now = self._settings.progress, time.perf_counter()
        if self._phase in self._seconds:
            seconds = self._seconds[self._phase] = now - self._phase_started
            session = self._held.session
            nbytes = 0 if session is None else session.job.nbytes
            self._recorder.add("phases", self._phase, self._phase_started, now)
            progress.ended(self._phase, self._version, self._push_id, seconds, nbytes)
        if phase == "pause":
            self._paused_at = now
        self._phase, self._phase_started = phase, now
        if phase:
            progress.started(phase, self._version)


def fleet_status(fleet: Fleet, deadlines: Deadlines) -> list[dict[str, Any]]:
    """Every agent's ``GET /status``, in the fleet's order.

    Raises:
        AgentUnreachableError: One does not answer.
    """
    return fleet.each(lambda agent: agent.get("/status", timeout_s=deadlines.status_s))
