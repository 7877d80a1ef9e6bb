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
    Reloaded,
    Resumed,
    ResumeFailed,
    RolledBack,
    SessionOpened,
)
from weightsync.state_records import AgentState, Effect, Step, torn, without_session

#: holds an engine that stood still as torn and was found whole, until it runs
FOUND_WHOLE = "found-whole"


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
        case Paused() if state.phase == "shadowing":
            # now, and not before, live memory may be written (WS-1)
            return Step(replace(state, phase="receiving", may_run=False))
        case PauseFailed() if state.phase == "shadowing":
            # it may be paused; no live byte has changed, so what the workers say makes it ready
            return Step(replace(state, phase="receiving"), (Effect.ABORT,))
        case PauseFailed(push_id) if state.phase == "ready":
            # paused until proven otherwise; if the resume fails too, the push's idle deadline or
            # a person tries again
            return Step(replace(state, phase="paused", owner=push_id), (Effect.RESUME,))
        case Resumed() if state.phase == "paused":
            return Step(replace(state, phase="ready", owner=None, may_run=False))
        case ResumeFailed() if state.phase == "paused":
            return Step(replace(state, may_run=True))
        case SessionOpened(session, epoch, rollback_to) if epoch == state.epoch:
            return Step(replace(state, session=session, rollback_to=rollback_to))
        case Connected(epoch) if epoch == state.epoch and state.session is not None:
            return Step(replace(state, connected=True))
        case Committed(version, over, before) if (
            state.phase == "receiving" and version == state.target
        ):
            whole = replace(state, phase="paused", version=version, target=None, rollback_to=before)
            whole = _committed(whole)
            # what one worker has ended, the others end too (WS-8)
            return Step(without_session(whole), (Effect.CLOSE,)) if over else Step(whole)
        case RolledBack(version, newest) if state.phase == "receiving":
            whole = replace(state, phase="paused", version=version, target=None)
            return Step(replace(whole, rollback_to=None, rolled_back_from=newest))
        case Reloaded() if state.phase == "receiving":
            whole = replace(without_session(state), phase="paused", version=0, target=None)
            return Step(replace(whole, rollback_to=None))
        case PushFailed(reachable) if state.phase in ("shadowing", "receiving"):
            if reachable:
                return Step(state, (Effect.ABORT,))
            if state.phase == "shadowing":
                return Step(_undisturbed(state))
            # a rollback or reload that failed brought no version: the next one repairs
            return Step(replace(torn(state), target=state.target or state.version + 1))
        case Aborted(versions, dirty, before) if state.phase == "shadowing":
            kept = replace(state, rollback_to=before)
            if versions and (dirty or len(versions) != 1):
                # a worker says otherwise; a torn engine that runs is stopped at once (WS-4)
                return Step(torn(kept), (Effect.PAUSE, Effect.CLOSE))
            return Step(_undisturbed(kept), (Effect.CLOSE,) if versions else ())
        case Aborted(versions, dirty, before) if state.phase == "receiving":
            state = replace(state, rollback_to=before)
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


def _undisturbed(state: AgentState) -> AgentState:
    """After a push that only wrote beside what serves; its epoch is over (WS-8)."""
    return replace(without_session(state), phase="ready", target=None, owner=None)


def _attached(state: AgentState, event: Attached) -> Step:
    interrupted = state.target is not None
    going_on = event.same and event.epoch == state.epoch and not interrupted
    known = replace(
        state,
        epoch=max(state.epoch, event.epoch),
        version=min(event.versions),
        may_run=event.paused,
        rollback_to=event.rollback_to,
        rolled_back_from=event.rolled_back_from,
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
        # it stood still because it was thought torn, and is not: nobody else would start it again.
        # A name like a push's holds it, to be given up if the resume fails or this agent dies.
        held_as_torn = event.same and interrupted and state.owner is None
        owner = FOUND_WHOLE if held_as_torn else owner
        whole = replace(known, phase="paused", target=None, owner=owner)
        return Step(whole, (Effect.CLOSE, Effect.RESUME) if held_as_torn else ())
    return Step(replace(known, phase="ready", target=None, owner=None))


def _committed(state: AgentState) -> AgentState:
    return replace(state, committed=state.version, committed_by=state.owner)
