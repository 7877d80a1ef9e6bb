"""What became of effects and of the engine, as the agent's state machine takes it.  Pure."""

from __future__ import annotations

from dataclasses import replace

from weightsync.state_events import (
    Aborted,
    Attached,
    Committed,
    Connected,
    EngineLost,
    Outcome,
    Paused,
    PauseFailed,
    PushFailed,
    Resumed,
    ResumeFailed,
    SessionOpened,
)
from weightsync.state_records import AgentState, Effect, Step, torn, without_session


def outcome(state: AgentState, event: Outcome) -> Step:
    """The state after an effect, or the engine, told what became of it; never refused."""
    if isinstance(event, Attached):
        return _attached(state, event)
    if isinstance(event, EngineLost):
        return Step(replace(state, phase="detached"))
    if state.phase == "detached":
        return Step(state)  # the answer of an engine that is gone: the next describe tells
    match event:
        case Paused(push_id) if state.phase == "ready":
            return Step(replace(state, phase="paused", owner=push_id))
        case Paused(push_id) if state.phase in ("paused", "torn"):
            return Step(replace(state, owner=push_id, may_run=False))
        case PauseFailed(push_id) if state.phase == "ready":
            # paused until proven otherwise; if the resume fails too, the push's idle deadline or
            # a person tries again
            return Step(replace(state, phase="paused", owner=push_id), (Effect.RESUME,))
        case Resumed() if state.phase == "paused":
            return Step(replace(state, phase="ready", owner=None, may_run=False))
        case ResumeFailed() if state.phase == "paused":
            return Step(replace(state, may_run=True))
        case SessionOpened(session, epoch) if epoch == state.epoch:
            return Step(replace(state, session=session))
        case Connected(epoch) if epoch == state.epoch and state.session is not None:
            return Step(replace(state, connected=True))
        case Committed(version, over) if state.phase == "receiving" and version == state.target:
            whole = _committed(replace(state, phase="paused", version=version, target=None))
            # what one worker has ended, the others end too (WS-8)
            return Step(without_session(whole), (Effect.CLOSE,)) if over else Step(whole)
        case PushFailed(reachable) if state.phase == "receiving":
            if reachable:
                return Step(state, (Effect.ABORT,))
            return Step(torn(state))
        case Aborted(versions, dirty) if state.phase == "receiving":
            if dirty or len(versions) != 1:
                lowest = max((state.target or 0, *(v + 1 for v in versions)))
                left = replace(torn(state), target=lowest)
                return Step(left, (Effect.CLOSE,) if versions else ())
            # WS-8: a late write of this push must find its registrations gone, so the epoch ends
            # even where nothing was touched
            whole = replace(without_session(state), phase="paused", target=None)
            return Step(replace(whole, version=min(versions)), (Effect.CLOSE, Effect.RESUME))
        case _:
            return Step(state)


def _attached(state: AgentState, event: Attached) -> Step:
    interrupted = state.target is not None
    going_on = event.same and event.epoch == state.epoch and not interrupted
    known = replace(
        state,
        epoch=max(state.epoch, event.epoch),
        version=min(event.versions),
        may_run=event.paused,
    )
    if event.same and event.versions == {state.target} and not event.dirty:
        known = _committed(known)  # all of it, and only the agent did not hear of it any more
    elif known.version > state.committed:
        known = replace(known, committed=known.version, committed_by=None)
    if not going_on:
        known = without_session(known)
    if event.dirty or len(event.versions) != 1:
        newer = max(event.versions) + 1
        target = max(newer, state.target or 0) if event.same else newer
        left = replace(torn(known), target=target)
        close = (Effect.CLOSE,) if event.same and state.session is not None else ()
        # a torn engine that runs is stopped at once (WS-4)
        return Step(left, close if event.paused else (Effect.PAUSE, *close))
    if event.paused:
        owner = state.owner if event.same and state.phase != "torn" else None
        return Step(replace(known, phase="paused", target=None, owner=owner))
    return Step(replace(known, phase="ready", target=None, owner=None))


def _committed(state: AgentState) -> AgentState:
    return replace(state, committed=state.version, committed_by=state.owner)
