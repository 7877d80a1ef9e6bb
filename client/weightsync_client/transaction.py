"""The control calls of one push, in one order over all agents, and the way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from enum import IntEnum
from typing import TypeVar

from weightsync.errors import StateError, WeightSyncError
from weightsync.protocol import (
    AbortRequest,
    BeginRequest,
    CommitRequest,
    Message,
    PauseMode,
    PauseRequest,
    PrepareRequest,
    RankDigests,
    ResumeRequest,
    StepResponse,
)
from weightsync_client.control import Agent
from weightsync_client.fresh import check_held
from weightsync_client.heartbeat import Heartbeat
from weightsync_client.policy import Roster
from weightsync_client.report import AgentOutcome
from weightsync_client.session import Session
from weightsync_client.settings import Deadlines
from weightsync_client.threads import wait_for_all
from weightsync_client.trace import Recorder

S = TypeVar("S", PrepareRequest, CommitRequest)

#: a push that its agents heard of so lately is not given up by them
_FRESH_S = 1.0
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
    An agent that the roster drops is told to abort while the others go on.

    Args:
        roster: The agents, and how many of them may fail.
        session: The epoch that this push is in.
        digests: For each agent's URL, every rank's digests of what it writes there.
        push_id: Names the push to the agents.
        version: What the engines will serve.
        deadlines: Of each call.
        pause_mode: What happens to running requests.
        reset_caches: Whether engines drop what they computed with other weights.
        recorder: Told of every call.
        joined: One agent alone is asked to pause and begin in one call, and to commit and resume.
            Several are not: all must have paused before one goes on, and committed before one
            resumes.
    """

    def __init__(
        self,
        roster: Roster,
        session: Session,
        digests: Mapping[str, list[RankDigests]],
        *,
        push_id: str,
        version: int,
        deadlines: Deadlines,
        pause_mode: PauseMode,
        reset_caches: bool,
        recorder: Recorder,
        joined: bool,
    ) -> None:
        self.joined = joined and len(roster.agents) == 1
        self._recorder = recorder
        self._roster = roster
        self._members = dict(session.members)
        self._digests = dict(digests)
        self._push_id = push_id
        self._version = version
        self._deadlines = deadlines
        self._pause_mode = pause_mode
        self._reset_caches = reset_caches
        self.stages = dict.fromkeys(roster.urls, Stage.UNTOUCHED)
        self._answers: dict[str, StepResponse] = {}
        self._seconds: dict[str, dict[str, float]] = {}
        self._aborts: list[Future[None]] = []
        roster.on_drop = self._abort_aside
        self._heard_at = 0.0
        self._heartbeat = Heartbeat(self._beat, every_s=_BEAT_S)

    @property
    def began(self) -> bool:
        """Whether a begin was sent anywhere: the session must not be used again after a failure."""
        return any(stage >= Stage.BEGINNING for stage in self.stages.values())

    def pause(self) -> None:
        """Stop generation everywhere.

        Raises:
            EnginePausedError: An engine is paused by hand.
        """
        self._roster.each("pause", self._pause)

    def _pause(self, agent: Agent) -> None:
        request = PauseRequest(
            mode=self._pause_mode, timeout_s=self._deadlines.pause_s, push_id=self._push_id
        )
        before = self.stages[agent.url]
        self.stages[agent.url] = max(before, Stage.PAUSING)
        try:
            self._post(agent, "/pause", request, self._deadlines.pause_s)
        except StateError:  # refused: nothing changed there, nothing is to be undone
            self.stages[agent.url] = before
            raise

    def begin(self) -> None:
        """Every worker checks its tensors and expects the writes.

        From here to the commit, or to the abort, the agents are told that this push lives: a long
        write is not given up.

        Raises:
            StaleEpochError, NoSessionError: A new rendezvous is needed; nothing changed.
            IdentityError: A kernel tensor moved.
        """

        def call(agent: Agent) -> None:
            self.stages[agent.url] = Stage.BEGINNING
            self._post_begin(agent)

        self._heard_at = time.monotonic()
        self._roster.each("begin", call)
        self._heartbeat.start()

    def pause_and_begin(self) -> float:
        """Both in one call, of the one agent; the seconds since it had paused.

        Raises:
            WeightSyncError: As of :meth:`pause` and :meth:`begin`; ``step`` of its context tells
                which, where the agent knows.
        """

        def call(agent: Agent) -> float:
            before = self.stages[agent.url]
            self.stages[agent.url] = Stage.BEGINNING
            request = self._begin(agent).model_copy(update=self._pausing)
            timeout_s = self._deadlines.pause_s + self._deadlines.begin_s
            try:
                answer = self._post(agent, "/begin_update", request, timeout_s)
            except WeightSyncError as error:
                if error.context.get("step") == "pause":  # nothing has begun
                    refused = isinstance(error, StateError)
                    self.stages[agent.url] = before if refused else Stage.PAUSING
                raise
            return answer.seconds.get("begin", 0.0)

        self._heard_at = time.monotonic()
        (begin_s,) = self._roster.each("begin", call).values()
        self._heartbeat.start()
        return begin_s

    def _post_begin(self, agent: Agent) -> None:
        self._post(agent, "/begin_update", self._begin(agent), self._deadlines.begin_s)

    def _begin(self, agent: Agent) -> BeginRequest:
        return BeginRequest(
            session=self._members[agent.url].session,
            epoch=self._members[agent.url].epoch,
            push_id=self._push_id,
            version=self._version,
            reset_prefix_cache=self._reset_caches,
            timeout_s=self._deadlines.begin_s,
        )

    def _beat(self) -> None:
        # A repeat of begin says no more than that.  Whether the push was given up all the same,
        # the commit tells.
        def call(agent: Agent) -> None:
            agent.post("/begin_update", self._begin(agent), StepResponse, timeout_s=_BEAT_S)

        self._roster.fleet.attempt(call, list(self._roster.present))

    def check_held(self) -> dict[str, WeightSyncError]:
        """On rank 0, right before the writes.  See :func:`check_held`."""
        return check_held(
            self._roster, self._push_id, self._deadlines, heard_at=self._heard_at, fresh_s=_FRESH_S
        )

    def _sent(self, kind: type[S], agent: Agent, timeout_s: float) -> S:
        """A call about what was written, with its digests."""
        return kind(
            session=self._members[agent.url].session,
            epoch=self._members[agent.url].epoch,
            push_id=self._push_id,
            version=self._version,
            ranks=self._digests[agent.url],
            timeout_s=timeout_s,
        )

    def commit(self, *, timeout_s: float, pause: bool = False) -> tuple[float, float]:
        """Make the version real everywhere.  Every write has completed.

        Args:
            timeout_s: For it alone.
            pause: The one agent, if ``joined``, is asked to pause in the same call, too.

        Returns:
            Seconds since the one agent had paused in this call, and since it had committed; the
            second is 0 where :meth:`resume` is still to come.

        Raises:
            VerifyError: The bytes at a worker are not those that were sent.
        """

        def call(agent: Agent) -> tuple[float, float]:
            request = self._sent(CommitRequest, agent, timeout_s)
            answer_s, before = timeout_s, self.stages[agent.url]
            if self.joined:
                request = request.model_copy(update={"resume": True})
                answer_s += self._deadlines.resume_s
            if pause:
                request = request.model_copy(update=self._pausing)
                answer_s += self._deadlines.pause_s
            self.stages[agent.url] = Stage.COMMITTING
            try:
                answer = self._post(agent, "/commit_update", request, answer_s)
            except WeightSyncError as error:
                if error.context.get("step") == "pause":  # no live byte was touched
                    self.stages[agent.url] = before
                raise
            resumed = self.joined and answer.state == "ready"
            self.stages[agent.url] = Stage.RESUMED if resumed else Stage.COMMITTED
            told = self._seconds[agent.url] = dict(answer.seconds)
            told.pop("pause", 0.0)
            resume_s = told.pop("resume", 0.0) if resumed else 0.0
            return told.get("commit", 0.0) + resume_s, resume_s

        self._heartbeat.stop()
        return max(self._roster.each("commit", call).values())

    @property
    def _pausing(self) -> dict[str, object]:
        """What asks for a pause in another call."""
        return {"pause": self._pause_mode, "pause_timeout_s": self._deadlines.pause_s}

    def resume(self) -> None:
        """Generate again everywhere, with the new weights."""
        paused = [a for a in self._roster.present if self.stages[a.url] != Stage.RESUMED]
        self._roster.each("resume", self._resume, paused)

    def outcomes(self) -> tuple[AgentOutcome, ...]:
        """What became of each agent, once those that were dropped have been told, or tried to."""
        wait_for_all(self._aborts)
        return tuple(self._outcome(agent.url) for agent in self._roster.agents)

    def _outcome(self, url: str) -> AgentOutcome:
        answer = self._answers.get(url)
        state, version = ("unknown", 0) if answer is None else (answer.state, answer.version)
        seconds = self._seconds.get(url)
        if self.stages.get(url) == Stage.RESUMED:  # at the second try, it may be
            return AgentOutcome(url, state, version, seconds or {})
        return self._roster.outcome(url, state, version, seconds)

    def abort(self, reason: str) -> list[str]:
        """Undo what can be undone, at every agent, each in at most its deadline.

        An engine that this push paused and that nothing was written to is resumed.  One that
        committed holds a whole version: it is resumed with it.  Whatever else an agent calls torn
        stays paused.

        Returns:
            What went wrong in doing so.
        """
        self._heartbeat.stop()
        answers = self._roster.fleet.attempt(
            lambda agent: self._abort(agent, reason, self._take_back), self._roster.present
        )
        wait_for_all(self._aborts)
        return [str(answer) for answer in answers.values() if isinstance(answer, WeightSyncError)]

    def _abort(self, agent: Agent, reason: str, committed: Callable[[Agent], object]) -> None:
        stage = self.stages[agent.url]
        if stage == Stage.COMMITTED:
            committed(agent)
        elif Stage.PAUSING <= stage <= Stage.COMMITTING:
            request = AbortRequest(
                session=self._members[agent.url].session,
                push_id=self._push_id,
                reason=reason[:4096],
            )
            answer = self._post(agent, "/abort_update", request, self._deadlines.abort_s)
            if answer.state == "paused" and stage == Stage.PAUSING:
                self._resume(agent)

    def _abort_aside(self, agent: Agent) -> None:
        """The same for an agent that was dropped, while the others go on; what fails is let be."""
        failure = self._roster.failures[agent.url]

        def call(agent: Agent) -> None:
            with suppress(WeightSyncError):
                self._abort(agent, f"{failure.phase}: {describe(failure.error)}", self._resume)

        self._aborts.append(self._roster.fleet.aside(call, agent))

    def fates(self) -> list[str]:
        """What became of each agent, for the error of a push that failed."""
        told = self._told()
        return [f"{url}: {told[stage]}" for url, stage in self.stages.items()]

    def _told(self) -> dict[Stage, str]:
        return {
            Stage.UNTOUCHED: "untouched",
            Stage.PAUSING: "unchanged",
            Stage.BEGINNING: "may be torn",
            Stage.COMMITTING: "may be torn",
            Stage.COMMITTED: f"has version {self._version}",
            Stage.RESUMED: f"serves version {self._version}",
        }

    def _take_back(self, agent: Agent) -> None:
        """The push has failed, and this agent has committed it: its version is whole."""
        self._resume(agent)

    def _post(self, agent: Agent, path: str, request: Message, timeout_s: float) -> StepResponse:
        sent_at = time.perf_counter()
        answer = self._answers[agent.url] = agent.post(
            path, request, StepResponse, timeout_s=timeout_s
        )
        self._recorder.called(agent.url, path, sent_at, answer.spans)
        return answer

    def _resume(self, agent: Agent) -> StepResponse:
        request = ResumeRequest(push_id=self._push_id)
        answer = self._post(agent, "/resume", request, self._deadlines.resume_s)
        if self.stages[agent.url] == Stage.COMMITTED:
            self.stages[agent.url] = Stage.RESUMED
        return answer


def describe(error: BaseException) -> str:
    """The error in a line, for an agent's log."""
    text = error.message if isinstance(error, WeightSyncError) else str(error)
    return f"{type(error).__name__}: {text}"
