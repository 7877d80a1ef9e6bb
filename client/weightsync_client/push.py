"""One push, from the look at the agents to the report."""

from __future__ import annotations

from weightsync_client.attempt import Attempt
from weightsync_client.opened import Open, PushSettings
from weightsync_client.opening import open_for
from weightsync_client.pushed import Pushed
from weightsync_client.report import PushReport
from weightsync_client.session import Session
from weightsync_client.source import WeightSource
from weightsync_client.transfer import Digests, Transfer


class Push(Attempt):
    """One try at one push, on one rank.

    Args:
        held: Taken over from the last push, and left to the next one.
        settings: The publisher's.
        pushed: The weights.
        wanted: The version; None: the next.
    """

    def __init__(
        self, held: Open, settings: PushSettings, pushed: Pushed, wanted: int | None
    ) -> None:
        super().__init__(held, settings)
        self.version = 0 if wanted is None else wanted
        self._wanted = wanted
        self._pushed = pushed
        self._filled_from: WeightSource | None = None

    def run(self) -> PushReport:
        """All phases in order; on any failure the way back, then the error itself.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.publisher.Publisher.push`.
        """
        deadlines = self.settings.deadlines
        try:
            session, fresh = open_for(self, self._pushed, self._wanted)
            self.enter("fill")
            exchange_s = self._gather(session)
            report = Transfer(self, session).run(
                lambda: self._fill(session, exchange_s),
                source=lambda: self._filled_from,
                fill_s=exchange_s + deadlines.for_bytes(deadlines.write_s, session.nbytes),
            )
        except BaseException as error:
            self.leave(error)
            raise
        self.settings.progress.done(report)
        if fresh:  # the first write of an epoch tells whether it took the right wire
            session.warn_if_slow(self.held.ranks.world_size)
        return report

    def _gather(self, session: Session) -> float:
        """Pack what ranks give each other; the seconds that the exchange may take."""
        if (gather := session.gather) is None:
            return 0.0
        deadlines = self.settings.deadlines
        exchange_s = deadlines.for_bytes(deadlines.write_s, gather.nbytes)
        # A meeting of its own: no rank takes part in an exchange that another has left.
        self.meet(
            "gather", lambda: gather.pack(self._pushed.source), lambda _: None,
            kind=None, result=None, work_s=exchange_s, decide_s=0.0,
        )  # fmt: skip
        return exchange_s

    def _fill(self, session: Session, exchange_s: float) -> Digests:
        source = self._pushed.source
        if session.gather is not None:
            with self.recorder.during("gather"):
                source = session.gather.exchange(self.held.ranks, source, timeout_s=exchange_s)
        self._filled_from = source
        with self.recorder.during("fill"):
            return session.fill(source, check_finite=self.settings.check_finite)
