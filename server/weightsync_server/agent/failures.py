"""What becomes of the state where a step of the agent fails or breaks off."""

from __future__ import annotations

from weightsync.errors import DeadlineError, EngineDetachedError, WeightSyncError
from weightsync.state import AgentState, Effect
from weightsync.state_events import (
    Aborted,
    EngineLost,
    Outcome,
    PauseAsked,
    PauseFailed,
    PushFailed,
    ResumeFailed,
)
from weightsync_server.agent.work import Work


def writes(state: AgentState) -> bool:
    """Whether a push may be writing; rollback and reload bring no version, or end the session."""
    return (
        state.phase in ("shadowing", "receiving")
        and state.target is not None
        and state.session is not None
    )


def failed_outcome(effect: Effect, work: Work, error: WeightSyncError) -> Outcome | None:
    """What a step that failed tells the state machine; None: nothing, the state is what it was."""
    match effect:
        case Effect.ATTACH if work.extra.get("by_hand") and not isinstance(
            error, EngineDetachedError
        ):
            return None  # nothing that it did before is in doubt
        case Effect.ATTACH:
            return EngineLost()
        case Effect.PAUSE if isinstance(work.event, PauseAsked):
            return PauseFailed(work.push_id)
        case Effect.PAUSE:
            return EngineLost()  # a torn engine that could not be stopped: attach again, and again
        case Effect.RESUME:
            return ResumeFailed()
        case Effect.BEGIN | Effect.PREPARE | Effect.COMMIT | Effect.ROLLBACK | Effect.RELOAD:
            # an engine that let a deadline pass would only let the next one pass too
            silent = isinstance(error, (DeadlineError, EngineDetachedError))
            return PushFailed(reachable=not silent or "places" in error.context)
        case Effect.ABORT:
            return Aborted(frozenset(), dirty=True)
        case _:
            return None
