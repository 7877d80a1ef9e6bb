"""What the agent's state machine is made of: the state, the effects, and a step's outcome."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Phase = Literal["detached", "ready", "shadowing", "paused", "receiving", "torn"]


class Effect(enum.Enum):
    """What the agent has to do next, in the order given."""

    ATTACH = "attach"
    PAUSE = "pause"
    RESUME = "resume"
    OPEN = "layout"
    CONNECT = "connect"
    BEGIN = "begin"
    PREPARE = "prepare"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    RELOAD = "reload"
    ABORT = "abort"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class AgentState:
    """Everything that decides which calls are legal.

    Attributes:
        phase: See the module's docstring.
        version: The last version that was whole on every worker.
        target: Shadowing, receiving: the version that is coming.  Torn: the lowest version that
            repairs: the interrupted one, or the next after those that workers already hold.
        owner: The push that holds the engine; None with ``paused``: it was paused by hand.
        session: The open rendezvous.
        epoch: The last epoch that was given out; it only grows.
        connected: Whether the session has finished round 2.
        may_run: Paused: a resume may be on its way to the engine; only another pause makes sure.
        committed: The highest version that a push ever committed here; the engine may have lost it.
        committed_by: That push, where it is known.
        rollback_to: The version before, whose bytes every worker keeps; None: there is none.
        rolled_back_from: The newest version that was given up by a rollback; 0: none.
    """

    phase: Phase = "detached"
    version: int = 0
    target: int | None = None
    owner: str | None = None
    session: str | None = None
    epoch: int = 0
    connected: bool = False
    may_run: bool = False
    committed: int = 0
    committed_by: str | None = None
    rollback_to: int | None = None
    rolled_back_from: int = 0

    @property
    def lowest(self) -> int:
        """The lowest version that a push may bring.

        Versions only grow.  An engine that serves its checkpoint (0) may be given again what it
        had, and a torn one the version that was interrupted: the new epoch keeps the
        notifications of the two apart (WS-2).
        """
        lowest = self.version + 1
        if self.phase == "torn" and self.target is not None:
            lowest = self.target
        return max(lowest, self.committed + (self.version > 0), self.rolled_back_from + 1)


class Step(NamedTuple):
    """A new state and what to do about it."""

    state: AgentState
    effects: tuple[Effect, ...] = ()


def without_session(state: AgentState) -> AgentState:
    """The same, its rendezvous over."""
    return replace(state, session=None, connected=False)


def torn(state: AgentState) -> AgentState:
    """The same, its weights not whole; nobody holds it."""
    return replace(without_session(state), phase="torn", owner=None)
