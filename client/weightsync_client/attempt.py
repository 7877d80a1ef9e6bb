"""What all ranks try together: phases, meetings, and the way back from a failure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from weightsync.errors import (
    AgentUnreachableError,
    DeadlineError,
    EngineDetachedError,
    WeightSyncError,
)
from weightsync.process import this_process
from weightsync.protocol import AbortRequest, StepResponse
from weightsync_client.control import Agent
from weightsync_client.opened import Open, PushSettings
from weightsync_client.policy import Roster
from weightsync_client.report import PHASES
from weightsync_client.trace import Recorder
from weightsync_client.transaction import Transaction, describe

#: seconds for an agent to take a word that it can do without
_WORD_S = 2.0

T = TypeVar("T")
R = TypeVar("R")


class Attempt:
    """One try at something, on one rank.  What speaks to agents runs on rank 0 alone.

    Args:
        held: Taken over from the last one, and left to the next one.
        settings: The publisher's.

    Attributes:
        version: What the engines get; 0 until it is known.
        push_id: What agents and logs call it.
        roster: The agents, from the first meeting on.
        statuses: On rank 0, what the agents told first.
        let_go: Sessions of the agents that were dropped once they may have begun, by URL.
        transaction: On rank 0, from the first pause on.
        wrote_nothing: No rank has begun to write.
        recorder: What this rank did when.
    """

    #: what messages call it
    what = "push"
    #: whether an agent that cannot be reached is one that the session was made with
    of_all = True

    def __init__(self, held: Open, settings: PushSettings) -> None:
        self.held = held
        self.settings = settings
        self.version = 0
        self.push_id = f"p-{uuid.uuid4().hex}"
        self.roster: Roster
        self.statuses: dict[str, dict[str, Any]] = {}
        self.let_go: dict[str, str] = {}
        self.transaction: Transaction | None = None
        self.wrote_nothing = True
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.paused_at = 0.0
        self.recorder = Recorder()
        self.started = self.recorder.zero
        self._phase = ""
        self._phase_started = 0.0
        self._undone = False

    def meet(
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
        """See :meth:`weightsync_client.ranks.Ranks.meet`."""
        # rank 0 may have to abort before it answers
        decide_s += self.settings.deadlines.abort_s + self.settings.deadlines.grace_s
        return self.held.ranks.meet(
            phase, work, decide, kind=kind, result=result, work_s=work_s, decide_s=decide_s,
            undo=self.undo,
        )  # fmt: skip

    def enter(self, phase: str, *, ago_s: float = 0.0) -> None:
        """End the phase that runs, and start the next; that was so many seconds ago."""
        progress, now = self.settings.progress, time.perf_counter() - ago_s
        if self._phase in self.seconds:
            seconds = now - self._phase_started
            self.seconds[self._phase] += seconds  # a push whose shadow is partial writes twice
            session = self.held.session
            nbytes = 0 if session is None else session.job.nbytes
            self.recorder.add("phases", self._phase, self._phase_started, now)
            progress.ended(self._phase, self.version, self.push_id, seconds, nbytes)
        if phase == "pause":
            self.paused_at = now
        self._phase, self._phase_started = phase, now
        if phase:
            progress.started(phase, self.version)

    def undo(self, error: BaseException) -> None:
        """On rank 0: abort at every agent, and tell the error what became of all."""
        self._undone = True
        elapsed_s = time.perf_counter() - self.started
        transaction = self.transaction
        fates = [] if transaction is None else transaction.fates()
        if transaction is not None:
            for failure in transaction.abort(f"{self._phase}: {describe(error)}"):
                error.add_note(f"the abort failed too: {failure}")
        if isinstance(error, WeightSyncError):
            error.context.update(
                phase=self._phase,
                version=self.version,
                push_id=self.push_id,
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
            f"{self.what} {self.push_id} of version {self.version} failed in phase {self._phase} "
            f"after {elapsed_s:.3f} s; {what_now}"
        )

    def tell_released(self, sessions: Mapping[str, str], *, aside: bool = False) -> None:
        """Give agents this process's word that it has no handle of this push left (WS-8).

        Others would have to wait for it.

        Args:
            sessions: That were open at each agent, by URL.
            aside: Do not wait for the answers.
        """
        me = this_process() if sessions else None
        if me is None:
            return

        def call(agent: Agent) -> None:
            request = AbortRequest(
                session=sessions[agent.url],
                push_id=self.push_id,
                reason="its writers have given their handles up",
                released=me,
            )
            agent.post("/abort_update", request, StepResponse, timeout_s=_WORD_S)

        # where it fails, the agent waits for this process to come back or to end
        agents = [agent for agent in self.roster.agents if agent.url in sessions]
        if not aside:
            self.roster.fleet.attempt(call, agents)
            return
        for agent in agents:
            self.roster.fleet.aside(call, agent)

    def leave(self, error: BaseException) -> None:
        """On every rank, whatever failed and wherever: drop what may be in flight."""
        try:
            if self.held.ranks.rank == 0 and not self._undone:
                self.undo(error)
        finally:
            began = self.transaction is not None and self.transaction.began
            wrote = began or not self.wrote_nothing
            # Writes may be in flight: nothing of this epoch is used again (WS-3, WS-8).  And who
            # could not be reached may have lost the wire, too, as only a write finds out.  The GPU
            # memory of an engine that is gone is mapped here, and the next one needs it.
            cut_off = isinstance(error, AgentUnreachableError | DeadlineError | EngineDetachedError)
            if wrote or (cut_off and self.of_all):
                members = {} if self.held.session is None else dict(self.held.session.members)
                try:
                    self.held.end_session()
                except WeightSyncError as also:
                    error.add_note(f"closing the session failed too: {also}")
                else:
                    sessions = {url: m.session for url, m in members.items()}
                    if wrote:
                        self.tell_released(sessions | self.let_go)
            self.settings.progress.failed(self._phase, self.version, self.push_id, error)
