"""What became of the last pushes, phase by phase: for ``/status``, listeners, metrics and the log.

It only watches.  Whatever it is told, the state machine alone decides what happens.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.logs import log_fields
from weightsync.protocol import PauseMode
from weightsync.state_events import Committed, Event, Reloaded, RolledBack
from weightsync.state_records import AgentState
from weightsync.worker_messages import ConnectBody
from weightsync_server.agent.events import EventHub
from weightsync_server.agent.metrics import Metrics
from weightsync_server.agent.status import PhaseStatus, PushStatus

log = logging.getLogger(__name__)

#: pushes that ``/status`` tells of
_KEPT = 32
#: outcomes of what is timed as a push, and put back what the engine had
_BACK = ("rolled_back", "reloaded")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one push, as the ranks declared them when they connected."""

    by_worker: tuple[int, ...] = ()
    by_rank: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, bodies: Sequence[ConnectBody]) -> Traffic:
        """Sum what goes to every worker, and what comes from every rank."""
        by_rank: dict[int, int] = {}
        by_worker = []
        for body in bodies:
            sums = {r.rank: sum(nbytes for _, _, nbytes in r.writes) for r in body.ranks}
            by_worker.append(sum(sums.values()))
            for rank, nbytes in sums.items():
                by_rank[rank] = by_rank.get(rank, 0) + nbytes
        return cls(tuple(by_worker), tuple(sorted(by_rank.items())))

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self.by_worker)


def ended_as(before: AgentState, after: AgentState, event: Event) -> str:
    """The outcome of the push that this event ended; empty: it ended none."""
    match event:
        case Committed():
            return "committed"
        case RolledBack():
            return "rolled_back"
        case Reloaded():
            return "reloaded"
    if after.phase == "torn" and before.phase == "receiving":
        return "torn"
    if after.phase == "detached" and before.owner is not None:
        return "engine_lost"
    return "aborted" if before.owner is not None and after.owner is None else ""


class PushClock:
    """Times the phases of pushes.  Used on the event loop only.

    Args:
        hub: Hears of every phase's start and end.
        metrics: Where they are counted.
    """

    def __init__(self, hub: EventHub, metrics: Metrics) -> None:
        self.recent: deque[PushStatus] = deque(maxlen=_KEPT)
        #: of a push in the open epoch
        self.traffic = Traffic()
        self._hub = hub
        self._metrics = metrics
        self._started_at = self._paused_at = 0.0
        self._phase_at = 0.0

    @property
    def last(self) -> PushStatus | None:
        """The push that runs, or the last one."""
        return self.recent[-1] if self.recent else None

    def connected(self, traffic: Traffic) -> None:
        """A rendezvous is complete."""
        self.traffic = traffic
        self._metrics.ranks.set(len(traffic.by_rank))

    def opened(self, push_id: str) -> None:
        """A push begins: this is its first step, and the engine may serve on."""
        if self._of(push_id) is not None:
            return
        self._started_at = self._paused_at = time.monotonic()
        self.recent.append(
            PushStatus(
                push_id=push_id,
                started_at=time.time(),
                nbytes=self.traffic.nbytes,
                ranks=len(self.traffic.by_rank),
            )
        )

    def paused(self, push_id: str, mode: PauseMode) -> None:
        """The push has just asked to stop the engine."""
        self._paused_at = time.monotonic()
        if (push := self._of(push_id)) is not None:
            push.mode = mode

    def starts(self, phase: str, push_id: str | None, version: int | None = None) -> None:
        """A phase of this push begins; one that still runs, but for ``write``, was cut off."""
        push = self._of(push_id)
        if push is None:
            return
        if version is not None:
            push.version = version
        # the trainer asks for these when it has written
        self._stop(push, ok=phase in ("prepare", "commit"))
        self._phase_at = time.monotonic()
        start_s = round(self._phase_at - self._started_at, 6)
        push.phases.append(PhaseStatus(phase=phase, start_s=start_s))
        self._tell(push)

    def ends(self, phase: str, push_id: str | None, *, ok: bool) -> None:
        """The phase is over."""
        push = self._of(push_id)
        if push is None or not push.phases or push.phases[-1].phase != phase:
            return
        self._stop(push, ok=ok)
        self._tell(push)

    def resumed(self, push_id: str | None) -> None:
        """The engine serves again, as this push asked."""
        push = self._of(push_id)
        if push is not None and "pause" in push.seconds and "paused" not in push.seconds:
            paused_s = push.seconds["paused"] = round(time.monotonic() - self._paused_at, 6)
            self._metrics.push_paused.observe(paused_s)
            self._tell(push)

    def end(self, outcome: str, state: AgentState, places: Sequence[str]) -> None:
        """The push is over and has left this state; ``places``: of the workers."""
        push = self.last
        if push is None or push.outcome != "running":
            return
        push.outcome = outcome
        if push.version is None and outcome in _BACK:  # no trainer's push
            given_up = outcome == "rolled_back"
            push.version = state.rolled_back_from if given_up else state.version
            push.nbytes = push.ranks = 0
        if outcome == "engine_lost":
            self._stop(push, ok=False)  # nobody will end the phase that runs
        self._metrics.pushes.labels(outcome).inc()
        if outcome == "committed":
            self._metrics.received(self.traffic.by_rank, places, self.traffic.by_worker)
            if self.traffic.nbytes and (write_s := push.seconds.get("write")):
                self._metrics.write_rate.set(self.traffic.nbytes / write_s)
        log_fields(
            log,
            logging.INFO if outcome in ("committed", *_BACK) else logging.WARNING,
            "push",
            phase="done",
            outcome=outcome,
            version=push.version,
            push_id=push.push_id,
            seconds=round(time.monotonic() - self._started_at, 6),
            nbytes=push.nbytes,
        )
        self._tell(push)

    def _of(self, push_id: str | None) -> PushStatus | None:
        push = self.last
        return push if push is not None and push.push_id == push_id else None

    def _stop(self, push: PushStatus, *, ok: bool) -> None:
        """End the phase that runs, if one does."""
        if not push.phases or push.phases[-1].seconds is not None:
            return
        phase = push.phases[-1]
        seconds = phase.seconds = round(time.monotonic() - self._phase_at, 6)
        phase.ok = ok
        if ok:
            push.seconds[phase.phase] = seconds
            self._metrics.seconds.labels(phase.phase).observe(seconds)
        log_fields(
            log,
            logging.INFO if ok else logging.WARNING,
            "push",
            phase=phase.phase,
            outcome="ok" if ok else "failed",
            version=push.version,
            push_id=push.push_id,
            seconds=seconds,
            nbytes=push.nbytes if phase.phase == "write" else 0,
        )

    def _tell(self, push: PushStatus) -> None:
        # the last phase alone: engines may be waiting while this is written
        phase = push.phases[-1]
        self._hub.publish(
            "push",
            {
                "push_id": push.push_id,
                "version": push.version,
                "outcome": push.outcome,
                "phase": phase.phase,
                "start_s": phase.start_s,
                "seconds": phase.seconds,
                "ok": phase.ok,
            },
        )
