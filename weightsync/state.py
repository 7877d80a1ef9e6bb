"""The agent's state: events in, a new state and effects out.  Pure: no I/O, no clock, no threads.

``detached -> ready(v) -> paused(v) -> receiving(v->w) -> paused(w) -> ready(w)``, in shadow mode
``ready(v) -> shadowing(v->w) -> receiving(v->w)``, and ``receiving -> torn`` when a push fails that
may have touched live weights.  What a caller asks for
is an event named ``...Asked``; :func:`step` refuses it with a
:class:`~weightsync.errors.StateError` and changes nothing, or returns the effects that the agent
has to carry out.  How an effect ended comes back as another event.

The one rule above all others (WS-4): ``RESUME`` is asked for only where every worker last said
that its weights are whole and of one version.
"""

from __future__ import annotations

from dataclasses import replace

from weightsync.errors import (
    EngineDetachedError,
    EnginePausedError,
    EngineTornError,
    NoPreviousError,
    NoSessionError,
    PushInProgressError,
    StaleEpochError,
    StaleVersionError,
    StateError,
)
from weightsync.state_events import (
    AbortAsked,
    AttachAsked,
    BeginAsked,
    CommitAsked,
    ConnectAsked,
    Event,
    InitAsked,
    PauseAsked,
    PrepareAsked,
    ReloadAsked,
    ResumeAsked,
    RollbackAsked,
)
from weightsync.state_outcomes import outcome
from weightsync.state_records import AgentState, Effect, Phase, Step, without_session

__all__ = ["AgentState", "Effect", "Phase", "Step", "check_rollback", "check_verify", "step"]

_RESUME_BY_HAND = "weightsync resume URL, or POST /resume without push_id"


def step(state: AgentState, event: Event) -> Step:
    """The state after ``event``, and the effects to carry out.

    Raises:
        StateError: The call is illegal now; nothing changed.
    """
    match event:
        case AttachAsked():
            if state.phase != "detached":
                _refuse_other_push(state, None)
            return Step(state, (Effect.ATTACH,))
        case PauseAsked(push_id):
            return _pause(state, push_id)
        case ResumeAsked(push_id):
            return _resume(state, push_id)
        case InitAsked():
            _refuse_detached(state)
            _refuse_other_push(state, None)
            ended = replace(without_session(state), epoch=state.epoch + 1)
            return Step(ended, (Effect.OPEN,))
        case ConnectAsked(session, epoch):
            _refuse_detached(state)
            _refuse_other_push(state, None)
            _check_session(state, session, epoch)
            return Step(replace(state, connected=False), (Effect.CONNECT,))
        case BeginAsked():
            return _begin(state, event)
        case PrepareAsked():
            _check_begun(state, event)
            return Step(state, (Effect.PREPARE,))
        case CommitAsked():
            return _commit(state, event)
        case RollbackAsked(push_id):
            return _rollback(state, push_id)
        case ReloadAsked(push_id):
            return _reload(state, push_id)
        case AbortAsked(push_id):
            return _abort(state, push_id)
        case _:
            return outcome(state, event)


def check_verify(state: AgentState, session: str, epoch: int) -> None:
    """Refuse a comparison that could not be one; it is no event, since it changes nothing.

    Raises:
        StateError: No engine, a push is writing, or this is not the connected rendezvous.
    """
    _refuse_detached(state)
    if state.phase in ("shadowing", "receiving"):
        raise PushInProgressError(
            f"push {state.owner} is writing", hint="ask again when it is over"
        )
    _check_session(state, session, epoch)
    if not state.connected:
        raise NoSessionError(
            f"session {session} has not finished its rendezvous", hint="POST /connect first"
        )


def check_rollback(state: AgentState, version: int | None) -> None:
    """Refuse a rollback before the engine is paused for it; no event, since it changes nothing.

    Args:
        state: Now.
        version: The one to be given up; None: whatever there is.

    Raises:
        StateError: No engine, a push is writing, another version, or nothing to go back to.
    """
    _refuse_detached(state)
    if state.phase in ("shadowing", "receiving"):
        raise PushInProgressError(
            f"push {state.owner} is writing version {state.target}",
            hint="POST /abort_update gives it up",
        )
    if state.rollback_to is None:
        raise NoPreviousError(
            f"no version before {state.version} is kept",
            hint="only the last push in shadow mode can be taken back, once, until the next push "
            "begins; push the weights that you want instead",
            version=state.version,
        )
    if version is not None and version not in (state.version, state.target):
        raise StateError(
            f"the engine has version {state.version}, not {version}",
            hint="GET /status tells what a rollback would do",
            version=state.version,
        )


# ------------------------------------------------------------------ asks


def _pause(state: AgentState, push_id: str | None) -> Step:
    _refuse_detached(state)
    _refuse_other_push(state, push_id)
    # torn: the pause is made sure of before a repair
    if state.phase in ("ready", "shadowing", "torn") or (state.may_run and state.owner == push_id):
        return Step(state, (Effect.PAUSE,))
    if state.phase == "paused" and state.owner != push_id:
        raise EnginePausedError(
            "the engine was paused by hand",
            hint=_RESUME_BY_HAND,
        )
    return Step(state)


def _resume(state: AgentState, push_id: str | None) -> Step:
    _refuse_detached(state)
    if state.phase == "torn":
        raise EngineTornError(
            f"the engine's weights are not whole: version {state.version} was being replaced",
            hint="push again, all of it, with a new rendezvous; or weightsync reload URL; or "
            "restart the engine"
            + ("" if state.rollback_to is None else "; or weightsync rollback URL"),
            version=state.version,
            lowest=state.target,
        )
    if state.phase in ("ready", "shadowing"):
        return Step(state)
    _refuse_other_push(state, push_id)
    if state.phase == "receiving":
        raise PushInProgressError(
            f"push {state.owner} is writing version {state.target}",
            hint="POST /commit_update or /abort_update first",
        )
    if state.owner != push_id:
        raise EnginePausedError(
            "the engine was paused by hand, only a resume by hand ends that",
            hint=_RESUME_BY_HAND,
        )
    return Step(state, (Effect.RESUME,))


def _begin(state: AgentState, ask: BeginAsked) -> Step:
    _refuse_detached(state)
    _refuse_other_push(state, ask.push_id)
    _check_session(state, ask.session, ask.epoch)
    if not state.connected:
        raise NoSessionError(
            f"session {ask.session} has not finished its rendezvous", hint="POST /connect first"
        )
    if state.phase == "receiving" and ask.version == state.target and not ask.shadow:
        return Step(state, (Effect.BEGIN,))  # paused now: live memory may be written too
    if state.phase in ("shadowing", "receiving"):
        raise StateError(
            f"push {ask.push_id} has begun already, with version {state.target}",
            hint="a push has one version",
        )
    if state.owner is None and state.phase == "paused":
        raise EnginePausedError(
            "the engine was paused by hand",
            hint=_RESUME_BY_HAND,
        )
    unpaused = ask.shadow and state.phase == "ready"
    if (state.owner is None or state.may_run) and not unpaused:
        # WS-1: nothing is written while it may run
        raise StateError(
            f"push {ask.push_id} has not paused the engine",
            hint="POST /pause with this push_id first",
        )
    if ask.version < state.lowest:
        had = f", and {state.committed} was pushed here" if state.committed > state.version else ""
        raise StaleVersionError(
            f"version {ask.version} is too old: the engine holds {state.version}{had}",
            hint=f"push version {state.lowest} or later; where versions really begin anew, start "
            "the agent with a new --journal",
            current=state.version,
            lowest=state.lowest,
        )
    # what was kept of the version before is about to be written over
    begun = replace(state, target=ask.version, rollback_to=None)
    if unpaused:
        return Step(replace(begun, phase="shadowing", owner=ask.push_id), (Effect.BEGIN,))
    return Step(replace(begun, phase="receiving"), (Effect.BEGIN,))


def _commit(state: AgentState, ask: CommitAsked) -> Step:
    _refuse_detached(state)
    if (state.committed_by, state.version) == (ask.push_id, ask.version) and state.target is None:
        return Step(state)  # done before an agent that remembers no answer was there
    _check_begun(state, ask)
    if state.phase == "shadowing":  # WS-1
        raise StateError(
            f"push {ask.push_id} has not paused the engine",
            hint="POST /pause with this push_id first",
        )
    return Step(state, (Effect.COMMIT,))


def _check_begun(state: AgentState, ask: PrepareAsked | CommitAsked) -> None:
    _refuse_detached(state)
    _refuse_other_push(state, ask.push_id)
    if state.phase == "torn":
        raise EngineTornError(
            f"push {ask.push_id} is over, the engine is torn", hint="push again, all of it"
        )
    _check_session(state, ask.session, ask.epoch)
    if state.phase not in ("shadowing", "receiving") or state.target != ask.version:
        raise StateError(
            f"push {ask.push_id} has not begun version {ask.version}: the engine is {state.phase}",
            hint="POST /begin_update first",
        )


def _rollback(state: AgentState, push_id: str) -> Step:
    _refuse_detached(state)
    _refuse_other_push(state, push_id)
    check_rollback(state, None)
    _refuse_running(state, push_id)
    return Step(replace(state, phase="receiving"), (Effect.ROLLBACK,))


def _reload(state: AgentState, push_id: str) -> Step:
    _refuse_detached(state)
    _refuse_other_push(state, push_id)
    if state.phase in ("shadowing", "receiving"):
        raise PushInProgressError(f"{push_id} has begun", hint="wait for it, or abort it")
    _refuse_running(state, push_id)
    return Step(replace(without_session(state), phase="receiving"), (Effect.RELOAD,))


def _refuse_running(state: AgentState, push_id: str) -> None:
    if state.owner is None or state.may_run:  # WS-1
        raise StateError(
            f"{push_id} has not paused the engine", hint="POST /pause with this push_id first"
        )


def _abort(state: AgentState, push_id: str) -> Step:
    _refuse_detached(state)
    _refuse_other_push(state, push_id)
    if state.owner is None:  # nothing here knows of that push (any more)
        return Step(state)
    if state.phase in ("shadowing", "receiving"):
        return Step(state, (Effect.ABORT,))
    if state.phase == "paused":
        return Step(state, (Effect.RESUME,))
    return Step(replace(state, owner=None))  # torn: a repair that never began


# ------------------------------------------------------------------ refusals


def _refuse_detached(state: AgentState) -> None:
    if state.phase == "detached":
        raise EngineDetachedError(
            "the agent has no engine", hint="GET /status tells why; the agent keeps trying"
        )


def _refuse_other_push(state: AgentState, push_id: str | None) -> None:
    if state.owner is not None and state.owner != push_id:
        raise PushInProgressError(
            f"push {state.owner} holds the engine",
            hint="wait for it; if its trainer is gone, the agent gives it up after a while",
            push_id=state.owner,
        )


def _check_session(state: AgentState, session: str, epoch: int) -> None:
    if state.session == session and state.epoch == epoch:
        return
    if 0 < epoch <= state.epoch:
        raise StaleEpochError(
            f"epoch {epoch} of session {session} is over (the last one is {state.epoch})",
            hint="make a new rendezvous: POST /init_transfer with a new session",
            epoch=state.epoch,
        )
    raise NoSessionError(
        f"no session {session} with epoch {epoch} here", hint="POST /init_transfer first"
    )
