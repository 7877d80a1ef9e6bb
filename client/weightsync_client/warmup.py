"""Before training starts: rendezvous, registration, and a probe write to every worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from weightsync.topology import cuda_address
from weightsync.transport.slow_path import warn_if_slow
from weightsync_client.attempt import Attempt
from weightsync_client.opened import Open, PushSettings
from weightsync_client.opening import open_for
from weightsync_client.policy import failures
from weightsync_client.progress import make_progress
from weightsync_client.pushed import Pushed
from weightsync_client.report import AgentOutcome, Probe, WarmupReport
from weightsync_client.session import Session


@dataclass(frozen=True)
class _Probed:
    """A rank's slowest probe, and what failed there, as problems by the agent's URL."""

    slowest: list[Probe]
    failed: dict[str, dict[str, Any]]


class Warmup(Attempt):
    """One warm-up, on one rank.  It shows no progress: it is over in seconds.

    Args:
        held: Left to the first push with a session that is open.
        settings: The publisher's.
        pushed: The weights: what they are, not their values.
    """

    what = "warm-up"

    def __init__(self, held: Open, settings: PushSettings, pushed: Pushed) -> None:
        super().__init__(held, replace(settings, progress=make_progress("off")))
        self._pushed = pushed

    def run(self) -> WarmupReport:
        """Rendezvous and probe; the engines serve all the while.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.publisher.Publisher.warmup`.
        """
        timeout_s = self.settings.deadlines.write_s
        try:
            session, _ = open_for(self, self._pushed, None)
            self.enter("probe")
            report = self.meet(
                "probe",
                lambda: self._probe(session, timeout_s),
                lambda probed: self._report(session, probed),
                kind=_Probed, result=WarmupReport, work_s=timeout_s, decide_s=0.0,
            )  # fmt: skip
            for agent in report.agents:
                if not agent.ok:
                    session.drop(agent.url)
            if session.in_flight:
                self.held.end_session()
        except BaseException as error:
            self.leave(error)
            raise
        return report

    def leave(self, error: BaseException) -> None:
        """As of any attempt; a probe that may still be in flight ends the session."""
        try:
            super().leave(error)
        finally:
            if self._phase == "probe":
                self.held.end_session()

    def _probe(self, session: Session, timeout_s: float) -> _Probed:
        probes, failed = session.probe(timeout_s=timeout_s)
        self.roster.bear(failed)
        slowest = sorted(probes, key=lambda p: p.seconds)[-1:]
        for probe in slowest:
            gpu = cuda_address(session.slots.slab.device)
            warn_if_slow(probe.nbytes, probe.seconds, gpu, probe=True)
        return _Probed(slowest, {url: e.to_problem() for url, e in failed.items()})

    def _report(self, session: Session, probed: list[_Probed]) -> WarmupReport:
        self.roster.drop("probe", failures([p.failed for p in probed]))
        self.enter("")
        return WarmupReport(
            nbytes=session.job.nbytes,
            rounds=session.job.rounds,
            rendezvous_s=self.seconds["rendezvous"],
            total_s=time.perf_counter() - self.started,
            agents=tuple(self._outcome(agent.url) for agent in self.roster.agents),
            slowest=tuple(probe for p in probed for probe in p.slowest),
        )

    def _outcome(self, url: str) -> AgentOutcome:
        status = self.statuses.get(url, {})
        state, version = status.get("state", "unknown"), status.get("version") or 0
        return self.roster.outcome(url, str(state), int(version))
