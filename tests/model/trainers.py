"""A trainer: its calls in their order, and the way back (as ``weightsync_client.transaction``)."""

from __future__ import annotations

from tests.model.records import (
    BEGINNING,
    COMMITTED,
    COMMITTING,
    PAUSING,
    UNTOUCHED,
    Call,
    Trainer,
    World,
    Write,
    set_trainer,
    shadowed,
)


def start(w: World, t: int) -> World:
    """The look at the agents, and the first calls."""
    trainer = w.trainers[t]
    tries = trainer.tries - 1
    push = f"{trainer.name}{tries}"
    if not all(agent.up for agent in w.agents):
        return set_trainer(w, t, trainer._replace(tries=tries))
    states = [agent.state for agent in w.agents]
    holds = trainer.session and all(
        s.connected and (s.session, s.epoch) == (trainer.session, epoch)
        for s, epoch in zip(states, trainer.epochs, strict=True)
    )
    known = (max(s.version, s.committed, s.target or 0, s.rolled_back_from) for s in states)
    version = 1 + max(trainer.last, *known)
    # a torn engine is repaired in the order of a direct push
    shadow = trainer.mode == "shadow" and all(s.phase == "ready" for s in states)
    holds = holds and shadow == shadowed(trainer.session)
    session = f"s{push}~" if shadow else f"s{push}"
    trainer = trainer._replace(
        tries=tries,
        push=push,
        version=version,
        session=trainer.session if holds else session,
        epochs=trainer.epochs if holds else (0,) * len(states),
        registrations=trainer.registrations if holds else (0,) * len(states),
        stages=(UNTOUCHED,) * len(states),
        failed=False,
    )
    return send(set_trainer(w, t, trainer), t, _following(trainer, "connect") if holds else "init")


_STAGES = {"pause": PAUSING, "begin": BEGINNING, "commit": COMMITTING}
_ORDERS = {
    False: ("init", "connect", "pause", "begin", "write", "commit", "resume", ""),
    True: ("init", "connect", "begin", "write", "prepare", "pause", "commit", "resume", ""),
}


def _following(trainer: Trainer, phase: str) -> str:
    order = _ORDERS[shadowed(trainer.session)]
    return order[order.index(phase) + 1]


def _brought(w: World, name: str, session: str) -> str:
    """What an agent goes on with by itself once a call of that name went well; "": nothing."""
    if not w.joined or (name == "pause" and shadowed(session)):
        return ""
    return {"pause": "begin", "commit": "resume"}.get(name, "")


def _reaches(w: World, phase: str, session: str) -> str:
    """How far an agent may come by the call of that phase."""
    return "begin" if _brought(w, phase, session) == "begin" else phase


def send(w: World, t: int, phase: str) -> World:
    """The same call to every agent; the stage is set before: an answer can get lost."""
    trainer = w.trainers[t]
    agents = range(len(w.agents))
    stages = trainer.stages
    reaches = _reaches(w, phase, trainer.session)
    if reaches in _STAGES:
        stages = tuple(max(_STAGES[reaches], stage) for stage in stages)
    last = trainer.version if reaches == "begin" else trainer.last
    trainer = trainer._replace(phase=phase, waits=frozenset(agents), stages=stages, last=last)
    made = {_made(trainer, t, phase, a) for a in agents}
    return set_trainer(w, t, trainer)._replace(calls=w.calls | made)


def _made(trainer: Trainer, t: int, name: str, a: int) -> Call:
    return Call(name, t, a, trainer.push, trainer.session, trainer.epochs[a], trainer.version)


def answer(
    w: World,
    call: Call,
    *,
    ok: bool,
    refused: bool = False,
    epoch: int = 0,
    registration: int = 0,
) -> World:
    if ok and (brought := _brought(w, call.name, call.session)):
        # whether or not anybody waits; a trainer that does sends the same call
        w = w._replace(calls=w.calls | {call._replace(name=brought)})
    trainer = w.trainers[call.trainer]
    waited = trainer.push == call.push and call.agent in trainer.waits
    if not waited or trainer.phase not in (call.name, "abort"):
        return w
    a = call.agent
    if refused and call.name == "rollback":  # nothing to go back to: what it has is whole
        return w._replace(calls=w.calls | {_made(trainer, call.trainer, "resume", a)})
    stages = list(trainer.stages)
    pausing = _reaches(w, "pause", call.session)
    if refused and call.name == "pause" and stages[a] == _STAGES[pausing]:
        stages[a] = UNTOUCHED
    if ok and call.name == "commit":
        stages[a] = COMMITTED
    epochs, registrations = list(trainer.epochs), list(trainer.registrations)
    if ok and call.name == "init":
        epochs[a], registrations[a] = epoch, registration
    trainer = trainer._replace(
        waits=trainer.waits - {a},
        failed=trainer.failed or not ok,
        stages=tuple(stages),
        epochs=tuple(epochs),
        registrations=tuple(registrations),
    )
    w = set_trainer(w, call.trainer, trainer)
    return w if trainer.waits else _go_on(w, call.trainer)


def written(w: World, t: int) -> World:
    """All writes of the push have landed."""
    return send(w, t, _following(w.trainers[t], "write"))


def _go_on(w: World, t: int) -> World:
    trainer = w.trainers[t]
    if trainer.phase == "abort":
        return set_trainer(w, t, _idle(trainer))
    if trainer.failed:
        return abort(w, t)
    following = _following(trainer, trainer.phase)
    if following == "write":
        return _post(w, t)
    if following:
        return send(w, t, following)
    return set_trainer(w, t, trainer._replace(phase="idle", done=trainer.done + 1))


def _post(w: World, t: int) -> World:
    trainer = w.trainers[t]
    made = {
        Write(t, a, k, r, engine.instance, trainer.registrations[a], trainer.push, trainer.version)
        for a, engine in enumerate(w.engines)
        for k in range(len(engine.workers))
        for r in range(trainer.ranks)
    }
    return set_trainer(w, t, trainer._replace(phase="write"))._replace(writes=w.writes | made)


def rank_fails(w: World, t: int, rank: int) -> World:
    """One rank ends before it has written; the others hear of it, wherever they are (WS-5)."""
    push = w.trainers[t].push
    gone = {x for x in w.writes if (x.push, x.rank) == (push, rank)}
    return abort(w._replace(writes=w.writes - gone), t)


def abort(w: World, t: int) -> World:
    trainer = w.trainers[t]
    made = set()
    for a, stage in enumerate(trainer.stages):
        if PAUSING <= stage <= COMMITTING:
            made.add(_made(trainer, t, "abort", a))
        elif stage == COMMITTED:
            back = "rollback" if shadowed(trainer.session) else "resume"
            made.add(_made(trainer, t, back, a))
    if not made:
        return set_trainer(w, t, _idle(trainer))
    waits = frozenset(call.agent for call in made)
    trainer = trainer._replace(phase="abort", waits=waits)
    return set_trainer(w, t, trainer)._replace(calls=w.calls | made)


def _idle(trainer: Trainer) -> Trainer:
    keeps = max(trainer.stages, default=UNTOUCHED) < BEGINNING
    return trainer._replace(
        phase="idle", waits=frozenset(), session=trainer.session if keeps else ""
    )
