"""An agent: the real state machine, and its effects one by one (as its ``Service``)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from tests.model.engines import breaks_off, carry_out
from tests.model.records import Agent, Apart, Call, Command, World, set_agent, set_engine, shadowed
from tests.model.trainers import answer
from weightsync.errors import DeadlineError, EngineDetachedError, EngineError, StateError
from weightsync.state import Effect, check_rollback, step
from weightsync.state_events import (
    AbortAsked,
    Ask,
    Attached,
    BeginAsked,
    CommitAsked,
    ConnectAsked,
    EngineLost,
    InitAsked,
    Outcome,
    PauseAsked,
    PrepareAsked,
    ResumeAsked,
    RollbackAsked,
)
from weightsync_server.agent.failures import failed_outcome
from weightsync_server.agent.work import Work

SILENT = DeadlineError("no answer", hint="-")
REFUSED = EngineError("a worker refused", hint="-", places=["w"])
GONE = EngineDetachedError("no engine", hint="-")


@cache
def event_of(call: Call) -> Ask:
    match call.name:
        case "init":
            return InitAsked(call.session)
        case "connect":
            return ConnectAsked(call.session, call.epoch)
        case "pause":
            return PauseAsked(call.push)
        case "begin":
            shadow = shadowed(call.session)
            return BeginAsked(call.session, call.epoch, call.push, call.version, shadow)
        case "prepare":
            return PrepareAsked(call.session, call.epoch, call.push, call.version)
        case "commit":
            return CommitAsked(call.session, call.epoch, call.push, call.version)
        case "abort":
            return AbortAsked(call.push)
        case _:
            return ResumeAsked(call.push)


def take(w: World, call: Call) -> World | None:
    """The agent hears a call; None: it waits for its turn."""
    agent = w.agents[call.agent]
    state = agent.state
    over = {
        "init": state.session != call.session,
        "connect": not state.connected or state.epoch != call.epoch,
    }
    for key, ok, epoch, registration in () if over.get(call.name) else agent.answered:
        if key == call.key:
            return answer(w, call, ok=ok, epoch=epoch, registration=registration)
    try:
        if call.name == "rollback":
            check_rollback(state, call.version)
            effects: tuple[Effect, ...] = ()
        else:
            state, effects = step(state, event_of(call))
    except StateError:
        return answer(w, call, ok=False, refused=True)
    if agent.work is not None:
        return None
    if call.name == "rollback":
        # in a push's own pause where there is one
        holder = call.push if agent.state.owner == call.push else f"rollback of {call.push}"
        return None if agent.apart is not None else _set_apart(w, call.agent, call, holder)
    agent = agent._replace(state=state)
    if not effects:
        return answer(set_agent(w, call.agent, agent), call, ok=True)
    if Effect.OPEN in effects or Effect.PAUSE in effects or Effect.BEGIN in effects:
        # on disk before it begins to matter, as what it is about to be
        owner = state.owner if call.name == "init" else call.push
        agent = agent._replace(synced=(replace(state, owner=owner), agent.known))
    return set_agent(w, call.agent, agent._replace(work=(call, event_of(call), effects, False)))


def ask(w: World, a: int, event: Ask) -> World:
    """The agent asks itself."""
    agent = w.agents[a]
    try:
        state, effects = step(agent.state, event)
    except StateError:
        return w
    work = (None, event, effects, False) if effects else None
    return set_agent(w, a, agent._replace(state=state, work=work))


def by_hand(w: World, a: int) -> World:
    """A person asks for a rollback."""
    w = w._replace(rollbacks=w.rollbacks - 1)
    try:
        check_rollback(w.agents[a].state, None)
    except StateError:
        return w
    return _set_apart(w, a, None, f"rollback {w.rollbacks}")


def _set_apart(w: World, a: int, call: Call | None, holder: str) -> World:
    left = (PauseAsked(holder), RollbackAsked(holder), ResumeAsked(holder))
    return set_agent(w, a, w.agents[a]._replace(apart=Apart(call, holder, left)))


def go_on(w: World, a: int) -> World:
    """The next step of a rollback, as another call between which others may be heard."""
    agent = w.agents[a]
    assert agent.apart is not None
    event, *left = agent.apart.left
    apart = agent.apart._replace(left=tuple(left), busy=True)
    try:
        state, effects = step(agent.state, event)
    except StateError:
        return _stepped(set_agent(w, a, agent._replace(apart=apart)), a, event, failed=True)
    synced = (replace(state, owner=apart.holder), agent.known)
    pauses = Effect.PAUSE in effects
    agent = agent._replace(state=state, apart=apart, synced=synced if pauses else agent.synced)
    if not effects:
        return _stepped(set_agent(w, a, agent), a, event, failed=False)
    return set_agent(w, a, agent._replace(work=(None, event, effects, False)))


def _stepped(w: World, a: int, event: Ask, *, failed: bool) -> World:
    """A step of a rollback is over."""
    agent = w.agents[a]
    assert agent.apart is not None
    apart = agent.apart._replace(busy=False)
    if failed and isinstance(event, RollbackAsked):
        # if it was refused, nothing has resumed the engine yet
        apart = apart._replace(left=(AbortAsked(apart.holder),), failed=True)
    elif failed or not apart.left:
        ok, call = not (failed or apart.failed), apart.call
        if call is not None and ok:
            done = (call.key, True, agent.state.epoch, 0)
            agent = agent._replace(answered=agent.answered | {done})
        w = set_agent(w, a, agent._replace(apart=None))
        return w if call is None else answer(w, call, ok=ok)
    return set_agent(w, a, agent._replace(apart=apart))


def perform_half(w: World, a: int) -> World | None:
    """A commit whose first worker breaks off in its exchange; None: it has none, or is refused."""
    agent, engine = w.agents[a], w.engines[a]
    assert agent.work is not None
    _, event, (effect, *_), _ = agent.work
    half = breaks_off(engine.workers[0], Command(a, 0, effect, event, agent.state.epoch))
    if half is None or engine.instance != agent.known:
        return None
    after = perform(w, a, failing=True)
    workers = (half, *after.engines[a].workers[1:])
    return set_engine(after, a, after.engines[a]._replace(workers=workers))


def perform(
    w: World, a: int, *, reached: int | None = None, late: bool = False, failing: bool = False
) -> World:
    """The agent's next effect.

    Args:
        w: Before.
        a: The agent.
        reached: So many workers carry it out, and no answer comes; None: all, and it does.
        late: The engine hears it later.
        failing: A worker answers with an error.
    """
    agent, engine = w.agents[a], w.engines[a]
    assert agent.work is not None
    call, event, (effect, *rest), failed = agent.work
    known = agent.known
    outcome: Outcome | None
    error = None
    if not engine.up or (effect is not Effect.ATTACH and engine.instance != known):
        error = GONE
    else:
        asks = effect in (Effect.PAUSE, Effect.RESUME) and agent.turn is None
        if effect is Effect.ATTACH or asks:  # whose turn it is; what was sent before is void then
            engine = engine._replace(turn=engine.turn + 1)
            agent = agent._replace(turn=engine.turn)
        turn = agent.turn or 0
        to = agent.state.rollback_to
        command = Command(a, engine.instance, effect, event, agent.state.epoch, turn, to)
        over = agent.state.target is not None or agent.state.session is None
        if effect is Effect.ATTACH and over and reached != 0:
            # a command of a push that broke off must find its epoch over
            engine, _ = carry_out(engine, command._replace(effect=Effect.CLOSE), None)
        if late:
            w = w._replace(late=w.late | {command})
        after, outcome = carry_out(engine, command, reached)
        outcome = None if failing else outcome
        w = set_engine(w, a, after)
        if effect in (Effect.PAUSE, Effect.RESUME, Effect.ATTACH):
            heard = reached is None and outcome is not None
            agent = agent._replace(turn=after.turn if heard else None)
        if reached is not None:
            error = SILENT
        elif outcome is None and effect is not Effect.CLOSE:
            error = REFUSED
        elif isinstance(outcome, Attached):
            outcome = Attached(
                outcome.versions, outcome.dirty, outcome.paused, outcome.epoch,
                known == engine.instance, outcome.rollback_to, outcome.rolled_back_from,
            )  # fmt: skip
            known = engine.instance
    state = agent.state
    if error is not None:
        if error is GONE and effect is not Effect.ATTACH:
            state = step(state, EngineLost()).state
        outcome = failed_outcome(effect, Work(event, 0.0), error)
        failed = failed or effect is not Effect.CLOSE
    effects = tuple(rest)
    if outcome is not None:
        state, more = step(state, outcome)
        effects += more
    if state.phase == "detached":
        effects, failed = (), failed or effect is not Effect.ATTACH
    agent = agent._replace(state=state, known=known)
    if effects:
        return set_agent(w, a, agent._replace(work=(call, event, effects, failed)))
    agent = agent._replace(work=None)
    registration = w.engines[a].workers[0].registration
    if call is not None and (not failed or call.name in ("begin", "commit")):
        answered = {x for x in agent.answered if x[0] != call.key}
        answered.add((call.key, not failed, state.epoch, registration))
        agent = agent._replace(answered=frozenset(answered))
    w = set_agent(w, a, agent)
    if agent.apart is not None and agent.apart.busy:
        return _stepped(w, a, event, failed=failed)
    if call is None:
        return w
    return answer(w, call, ok=not failed, epoch=state.epoch, registration=registration)


def lose(w: World, a: int) -> World:
    agent = w.agents[a]
    state = step(agent.state, EngineLost()).state
    w = set_agent(w, a, agent._replace(state=state, work=None, apart=None))
    return _all_failed(w, agent)


def _all_failed(w: World, agent: Agent) -> World:
    """Whoever waits for it hears that it failed."""
    of = [None if agent.work is None else agent.work[0], agent.apart and agent.apart.call]
    for call in of:
        w = w if call is None else answer(w, call, ok=False)
    return w


def drop(w: World, a: int, keeps: str) -> World:
    """The agent dies; what its successor finds: ``all``, what was ``synced``, ``nothing``."""
    old = w.agents[a]
    dead = Agent(up=False, forgot=old.forgot)
    if keeps == "all":
        # the answers to a rendezvous are not among what is kept
        kept = frozenset(x for x in old.answered if x[0][0] not in ("init", "connect"))
        dead = dead._replace(
            state=old.state, known=old.known, synced=(old.state, old.known), answered=kept
        )
    elif keeps == "synced":
        state, known = old.synced
        dead = dead._replace(state=state, known=known, synced=old.synced)
    else:
        dead = dead._replace(forgot=True)
    return _all_failed(set_agent(w, a, dead), old)


def recall(w: World, a: int) -> World:
    """Another agent starts in its place, with the journal that it left."""
    agent = w.agents[a]
    state = replace(agent.state, phase="detached")
    return set_agent(w, a, agent._replace(up=True, state=state))
