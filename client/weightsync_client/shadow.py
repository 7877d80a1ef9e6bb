"""A push in shadow mode: the engines serve while it is written and checked, and can go back."""

from __future__ import annotations

from weightsync.errors import StateError
from weightsync.protocol import (
    BeginRequest,
    PrepareRequest,
    RollbackRequest,
)
from weightsync_client.control import Agent
from weightsync_client.peers import Worker
from weightsync_client.session import Session
from weightsync_client.transaction import Stage, Transaction


def lands_aside(session: Session) -> bool:
    """Whether nothing is written to what serves: no engine need stop before the commit (WS-1)."""
    return not any(_lands_live(worker) for worker in session.workers)


def _lands_live(worker: Worker) -> bool:
    return any(region.mode == "direct" for region in worker.layout.regions)


class ShadowTransaction(Transaction):
    """Begin all, (write), prepare all, pause all, commit all, resume all.

    Where the shadows hold only a part, the rest is written after the pause: :meth:`begin_live`.
    Until then nothing that an engine serves with has changed (WS-1); what was checked before
    the pause is not checked again in it (WS-4).
    """

    def _begin(self, agent: Agent) -> BeginRequest:
        return super()._begin(agent).model_copy(update={"mode": "shadow"})

    def _post_begin(self, agent: Agent) -> None:
        try:
            super()._post_begin(agent)
        except StateError as error:
            if type(error) is not StateError:
                raise
            # its engine is torn: nothing to wait with, it is made sure that it stands still
            self._pause(agent)
            self.stages[agent.url] = Stage.BEGINNING
            super()._post_begin(agent)

    def prepare(self, *, timeout_s: float) -> None:
        """Check everywhere what was written; the engines serve on.

        Raises:
            VerifyError: The bytes at a worker are not those that were sent.
        """

        def call(agent: Agent) -> None:
            request = self._sent(PrepareRequest, agent, timeout_s)
            self._post(agent, "/prepare_commit", request, timeout_s)
            if not any(_lands_live(worker) for worker in self._members[agent.url].workers):
                self._digests[agent.url] = []

        self._roster.each("prepare", call)

    def begin_live(self) -> None:
        """The engines stand still: what has no shadow may be written now (WS-1)."""

        def call(agent: Agent) -> None:
            request = super(ShadowTransaction, self)._begin(agent)
            self._post(agent, "/begin_update", request, self._deadlines.begin_s)

        self._roster.each("begin", call)

    def _take_back(self, agent: Agent) -> None:
        request = RollbackRequest(
            push_id=self._push_id,
            version=self._version,
            mode=self._pause_mode,
            timeout_s=self._deadlines.abort_s,
        )
        try:
            self._post(agent, "/rollback", request, self._deadlines.abort_s)
        except StateError:  # the first push without a checkpoint has nothing to go back to
            self._resume(agent)

    def _told(self) -> dict[Stage, str]:
        return super()._told() | {
            Stage.BEGINNING: "serves what it served",
            Stage.COMMITTING: "may be torn, then weightsync rollback mends it",
            Stage.COMMITTED: "goes back to the version before",
        }
