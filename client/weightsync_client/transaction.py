"""The control calls of one push, in one order over all agents, and the way back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import IntEnum

from weightsync.errors import DeadlineError, StaleEpochError, StateError, WeightSyncError
from weightsync.protocol import (
    AbortRequest,
    BeginRequest,
    CommitRequest,
    Message,
    PauseMode,
    PauseRequest,
    RankDigests,
    ResumeRequest,
    StepResponse,
)
from weightsync_client.control import Agent, Fleet
from weightsync_client.heartbeat import Heartbeat
from weightsync_client.report import AgentOutcome
from weightsync_client.session import Session
from weightsync_client.settings import Deadlines
from weightsync_client.trace import Recorder

#: a push that its agents heard of so lately is not given up by them
_FRESH_S = 1.0
_TRIES = 3
#: how often, while it writes, a push tells its agents that it lives; far below their
#: push_idle_timeout_s, and the wait for an answer that nobody needs
_BEAT_S = 5.0


class Stage(IntEnum):
    """How far one agent has come.  Set *before* the call: an answer can get lost."""

    UNTOUCHED = 0
    PAUSING = 1
    BEGINNING = 2
    COMMITTING = 3
    COMMITTED = 4
    RESUMED = 5


class Transaction:
    """One push at every agent: pause all, begin all, (write), commit all, resume all.

    The calls are made in that order, each once; after an error only :meth:`abort` may follow.

    Args:
        fleet: All agents.
        session: The epoch that this push is in.
        digests: For each agent, every rank's digests of what it writes there.
        push_id: Names the push to the agents.
        version: What the engines will serve.
        deadlines: Of each call.
        pause_mode: What happens to running requests.
        recorder: Told of every call.
    """

    def __init__(
        self,
        fleet: Fleet,
        session: Session,
        digests: Sequence[list[RankDigests]],
        *,
        push_id: str,
        version: int,
        deadlines: Deadlines,
        pause_mode: PauseMode,
        recorder: Recorder,
    ) -> None:
        self._recorder = recorder
        self._fleet = fleet
        self._session = session
        self._digests = digests
        self._push_id = push_id
        self._version = version
        self._deadlines = deadlines
        self._pause_mode = pause_mode
        self.stages = [Stage.UNTOUCHED] * len(fleet.agents)
        self._seconds: list[dict[str, float]] = [{} for _ in fleet.agents]
        self._heard_at = 0.0
        self._heartbeat = Heartbeat(self._beat, every_s=_BEAT_S)

    @property
    def began(self) -> bool:
        """Whether a begin was sent anywhere: the session must not be used again after a failure."""
        return any(stage >= Stage.BEGINNING for stage in self.stages)

    def pause(self) -> None:
        """Stop generation everywhere.

        Raises:
            EnginePausedError: An engine is paused by hand.
        """

        def call(agent: Agent) -> None:
            request = PauseRequest(
                mode=self._pause_mode, timeout_s=self._deadlines.pause_s, push_id=self._push_id
            )
            self.stages[agent.index] = Stage.PAUSING
            try:
                self._post(agent, "/pause", request, self._deadlines.pause_s)
            except StateError:  # refused: nothing changed there, nothing is to be undone
                self.stages[agent.index] = Stage.UNTOUCHED
                raise

        self._fleet.each(call)

    def begin(self) -> None:
        """Every worker checks its tensors and expects the writes.

        From here to the commit, or to the abort, the agents are told that this push lives: a long
        write is not given up.

        Raises:
            StaleEpochError, NoSessionError: A new rendezvous is needed; nothing changed.
            IdentityError: A kernel tensor moved.
        """

        def call(agent: Agent) -> None:
            self.stages[agent.index] = Stage.BEGINNING
            self._post(agent, "/begin_update", self._begin(agent), self._deadlines.begin_s)

        self._heard_at = time.monotonic()
        self._fleet.each(call)
        self._heartbeat.start()

    def _begin(self, agent: Agent) -> BeginRequest:
        return BeginRequest(
            session=self._session.id,
            epoch=self._session.epochs[agent.index],
            push_id=self._push_id,
            version=self._version,
            timeout_s=self._deadlines.begin_s,
        )

    def _beat(self) -> None:
        # A repeat of begin says no more than that.  Whether the push was given up all the same,
        # the commit tells.
        def call(agent: Agent) -> None:
            agent.post("/begin_update", self._begin(agent), StepResponse, timeout_s=_BEAT_S)

        self._fleet.each_safely(call)

    def check_held(self) -> None:
        """On rank 0, right before the writes.  See :func:`check_held`."""
        check_held(
            self._fleet, self._push_id, self._deadlines, heard_at=self._heard_at, fresh_s=_FRESH_S
        )

    def commit(self, *, timeout_s: float) -> None:
        """Make the version real everywhere.  Every write has completed.

        Raises:
            VerifyError: The bytes at a worker are not those that were sent.
        """

        def call(agent: Agent) -> None:
            request = CommitRequest(
                session=self._session.id,
                epoch=self._session.epochs[agent.index],
                push_id=self._push_id,
                version=self._version,
                ranks=self._digests[agent.index],
                timeout_s=timeout_s,
            )
            self.stages[agent.index] = Stage.COMMITTING
            answer = self._post(agent, "/commit_update", request, timeout_s)
            self.stages[agent.index] = Stage.COMMITTED
            self._seconds[agent.index] = answer.seconds

        self._heartbeat.stop()
        self._fleet.each(call)

    def resume(self) -> tuple[AgentOutcome, ...]:
        """Generate again everywhere, with the new weights."""
        answers = self._fleet.each(self._resume)
        return tuple(
            AgentOutcome(agent.url, answer.state, answer.version, self._seconds[agent.index])
            for agent, answer in zip(self._fleet.agents, answers, strict=True)
        )

    def abort(self, reason: str) -> list[str]:
        """Undo what can be undone, at every agent, each in at most its deadline.

        An engine that this push paused and that nothing was written to is resumed.  One that
        committed holds a whole version: it is resumed with it.  Whatever else an agent calls torn
        stays paused.

        Returns:
            What went wrong in doing so.
        """

        def call(agent: Agent) -> None:
            stage = self.stages[agent.index]
            if stage == Stage.COMMITTED:
                self._resume(agent)
            elif Stage.PAUSING <= stage <= Stage.COMMITTING:
                request = AbortRequest(
                    session=self._session.id, push_id=self._push_id, reason=reason[:4096]
                )
                answer = agent.post(
                    "/abort_update", request, StepResponse, timeout_s=self._deadlines.abort_s
                )
                if answer.state == "paused" and stage == Stage.PAUSING:
                    self._resume(agent)

        self._heartbeat.stop()
        return self._fleet.each_safely(call)

    def fates(self) -> list[str]:
        """What became of each agent, for the error of a push that failed."""
        told = {
            Stage.UNTOUCHED: "untouched",
            Stage.PAUSING: "unchanged",
            Stage.BEGINNING: "may be torn",
            Stage.COMMITTING: "may be torn",
            Stage.COMMITTED: f"has version {self._version}",
            Stage.RESUMED: f"serves version {self._version}",
        }
        return [f"{a.url}: {told[self.stages[a.index]]}" for a in self._fleet.agents]

    def _post(self, agent: Agent, path: str, request: Message, timeout_s: float) -> StepResponse:
        sent_at = time.perf_counter()
        answer = agent.post(path, request, StepResponse, timeout_s=timeout_s)
        self._recorder.called(agent.url, path, sent_at, answer.spans)
        return answer

    def _resume(self, agent: Agent) -> StepResponse:
        request = ResumeRequest(push_id=self._push_id)
        answer = self._post(agent, "/resume", request, self._deadlines.resume_s)
        if self.stages[agent.index] == Stage.COMMITTED:
            self.stages[agent.index] = Stage.RESUMED
        return answer


def describe(error: BaseException) -> str:
    """The error in a line, for an agent's log."""
    text = error.message if isinstance(error, WeightSyncError) else str(error)
    return f"{type(error).__name__}: {text}"


def check_held(
    fleet: Fleet, push_id: str, deadlines: Deadlines, *, heard_at: float, fresh_s: float
) -> None:
    """Right before the writes: if the begin was a while ago, ask the agents if it still holds.

    A trainer that stood still was given up meanwhile, and the engine may serve the version of
    another push by now.  A network card would refuse the late writes; on one host, where a
    peer's memory can be written without its help, nothing else does (WS-8).

    Args:
        fleet: All agents.
        push_id: Of the push that began.
        deadlines: Of the looks.
        heard_at: When, by the monotonic clock, the push surely was not given up.
        fresh_s: It is not given up so soon after that.

    Raises:
        StaleEpochError: An agent has given this push up; nothing was written from here.
        DeadlineError: Agents or this process are too slow to be sure; nothing was written.
    """

    def call(agent: Agent) -> None:
        status = agent.get("/status", timeout_s=deadlines.status_s)
        if (status.get("state"), status.get("pause_owner")) != ("receiving", push_id):
            raise StaleEpochError(
                f"agent {agent.url} has given push {push_id} up: it was not heard of for "
                f"too long, and the engine is {status.get('state')} now",
                hint="push again; raise the agent's --push-idle-timeout-s if this trainer may "
                "stand still for so long",
                agent=agent.url,
            )

    for _ in range(_TRIES):
        asked = time.monotonic()
        if asked - heard_at < fresh_s:
            return
        fleet.each(call)
        heard_at = asked
    raise DeadlineError(
        f"{_TRIES} looks at the agents, one after another, took over {fresh_s:g} s each",
        hint="is this machine, or an agent's, out of memory or CPU?",
    )
