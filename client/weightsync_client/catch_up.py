"""One agent gets what the last push sent, from the slots, while the others serve on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.errors import InputError, LayoutError, NoSessionError
from weightsync_client.attempt import Attempt
from weightsync_client.control import Agent, checked_urls
from weightsync_client.opened import Open, PushSettings
from weightsync_client.policy import Roster
from weightsync_client.rendezvous import admit
from weightsync_client.report import AgentOutcome
from weightsync_client.session import Session
from weightsync_client.transfer import Transfer


@dataclass(frozen=True)
class _Has:
    """What a rank has of the last push: its session, the version that it sent, and how.

    ``whole``: all of it is still in memory, as it was sent.
    """

    session: str
    url: str
    sent: int | None
    rounds: int
    whole: bool


@dataclass(frozen=True)
class _Goal:
    """Where to: ``version`` of the last push.

    ``there``: the agent has it already.  ``stale``: it takes a rendezvous first.
    """

    push_id: str
    version: int
    stale: bool
    there: AgentOutcome | None


class CatchUp(Attempt):
    """One catch-up, on one rank.

    Args:
        held: The last push's session is used, and the agent is in it afterwards.
        settings: The publisher's.
        url: The agent.
    """

    what = "catch-up"
    of_all = False

    def __init__(self, held: Open, settings: PushSettings, url: str) -> None:
        super().__init__(held, settings)
        (self._url,) = checked_urls([url])

    def run(self) -> AgentOutcome:
        """Rendezvous where it needs one, pause, write, commit, resume: that agent alone.

        Raises:
            WeightSyncError: See :meth:`weightsync_client.publisher.Publisher.catch_up`.
        """
        deadlines = self.settings.deadlines
        try:
            goal = self.meet(
                "catch_up", self._has, self._decide, kind=_Has, result=_Goal,
                decide_s=deadlines.status_s + deadlines.grace_s,
            )  # fmt: skip
            if goal.there is not None:
                return goal.there
            self.version, self.push_id = goal.version, goal.push_id
            session = self._session()
            self.held.fleet.use([self._url])
            self.roster = Roster(self.held.fleet)
            if goal.stale:
                self.enter("rendezvous")
                self._admit(session)
            self.enter("fill")
            report = Transfer(self, session).run(
                lambda: session.digests([self._url]),
                source=lambda: None,
                fill_s=deadlines.grace_s,
            )
        except BaseException as error:
            self.leave(error)
            raise
        self.settings.progress.done(report)
        return report.agents[0]

    def leave(self, error: BaseException) -> None:
        """As of any attempt; the agent needs a new rendezvous, the others keep theirs."""
        try:
            super().leave(error)
        finally:
            if self.held.session is not None:
                self.held.session.drop(self._url)

    def _session(self) -> Session:
        if self.held.session is None:
            raise NoSessionError("nothing was pushed yet", hint="push reaches every agent")
        return self.held.session

    def _admit(self, session: Session) -> None:
        session.drop(self._url)
        taken = admit(
            session, [self._url], self.roster, self.held.ranks,
            deadlines=self.settings.deadlines, mode=self.settings.mode, undo=self.undo,
        )  # fmt: skip
        if not taken:
            raise LayoutError(
                f"the workers of {self._url} want what no worker of the last push wanted",
                hint="push again: that makes a new rendezvous with all agents",
                agent=self._url,
            )

    def _has(self) -> _Has:
        session = self.held.session
        if session is None:
            return _Has("", self._url, None, 0, whole=False)
        return _Has(session.key, self._url, session.sent, session.rounds, session.holds_sent())

    def _decide(self, ranks: Sequence[_Has]) -> _Goal:
        self.enter("status")
        if len({has.url for has in ranks}) > 1:
            raise InputError(
                f"the ranks name different agents: {sorted({has.url for has in ranks})}",
                hint="catch the same agent up on every rank",
            )
        session = self.held.session
        sent = {(has.session, has.sent) for has in ranks}
        version = ranks[0].sent
        if session is None or version is None or len(sent) > 1:
            raise NoSessionError(
                "the slots hold no version that was pushed: there was no push yet, or the last one "
                "failed, or writes of it were given up and may still land",
                hint="push reaches every agent",
            )
        if (rounds := max(has.rounds for has in ranks)) > 2:
            raise InputError(
                f"the last push went through the slots in {rounds} rounds: they hold the end of it",
                hint="push again, which reaches every agent; with a larger max_slot_bytes all of a "
                "version stays in the slots",
                rounds=rounds,
            )
        if changed := [rank for rank, has in enumerate(ranks) if not has.whole]:
            raise InputError(
                f"weights that are sent from where they are have changed since version {version} "
                f"on ranks {changed}",
                hint="push again, or call catch_up before the next step of training; with "
                "Publisher(zero_copy_bytes=0) a version stays in the slots",
                ranks=changed,
            )
        self.version = version
        self.held.fleet.use([self._url])
        (agent,) = self.held.fleet.agents
        return self._goal(agent, session, version)

    def _goal(self, agent: Agent, session: Session, version: int) -> _Goal:
        status = agent.get("/status", timeout_s=self.settings.deadlines.status_s)
        member = session.members.get(self._url)
        stale = member is None or not member.open_at(status)
        there = None
        if status.get("state") == "ready" and not stale and status.get("version") == version:
            there = AgentOutcome(self._url, "ready", version)
        return _Goal(self.push_id, version, stale, there)
