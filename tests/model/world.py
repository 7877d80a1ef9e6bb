"""A small world of trainers, agents and engines, in which everything that can go wrong may.

The agents run the real state machine (:func:`weightsync.state.step`) and the real reading of
failures; trainers, engines and workers are honest small models of theirs.  What the world leaves
out is time: whatever may be late may be late for ever, and every deadline may pass at any moment.

What is assumed of the wire (WS-8): a write to a registration that its worker has given up does not
land.  ``fenced=False`` takes that away, and ``ordered=False`` the order of pauses and resumes at an
engine, to see that the exploration notices.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.agents import ask, by_hand, drop, go_on, lose, perform, perform_half, recall, take
from tests.model.engines import carry_out
from tests.model.records import (
    Call,
    Command,
    Engine,
    Worker,
    World,
    Write,
    heard,
    set_engine,
    set_trainer,
)
from tests.model.trainers import abort, answer, rank_fails, start, written
from weightsync.state import Effect
from weightsync.state_events import AbortAsked, AttachAsked


def successors(w: World) -> Iterator[tuple[str, World]]:
    """Every next world, with what happened; each fault takes one of ``faults``."""
    yield from _trainers(w)
    for call in w.calls:
        yield from _call(w, call)
    for a in range(len(w.agents)):
        yield from unasked(w, a)
    for write in w.writes:
        yield f"{write.push}'s write to worker {write.worker} lands", land(w, write)
    for command in w.late:
        yield f"agent {command.agent}'s late {command.effect.value} is heard", _hear(w, command)
    for a, agent in enumerate(w.agents):
        if w.rollbacks and agent.up and agent.work is None and agent.apart is None:
            yield f"a person asks agent {a} for a rollback", by_hand(w, a)
    if w.faults:
        hurt = w._replace(faults=w.faults - 1)
        for name, after in _faults(hurt):
            yield f"FAULT {name}", after


def _trainers(w: World) -> Iterator[tuple[str, World]]:
    for t, trainer in enumerate(w.trainers):
        if trainer.phase == "idle" and trainer.tries:
            yield f"trainer {t} starts a push", start(w, t)


def _call(w: World, call: Call) -> Iterator[tuple[str, World]]:
    agent = w.agents[call.agent]
    if not agent.up:
        yield f"{call.name} finds no agent", answer(heard(w, call), call, ok=False)
        return
    after = take(w, call)
    if after is not None:
        yield f"{call.name} of {call.push} is heard", heard(after, call)


def unasked(w: World, a: int) -> Iterator[tuple[str, World]]:
    agent, engine = w.agents[a], w.engines[a]
    if not agent.up:
        yield f"agent {a} starts again", recall(w, a)
        return
    if agent.work is not None:
        yield f"agent {a}: {agent.work[2][0].value}", perform(w, a)
        return
    if agent.apart is not None:
        yield f"agent {a} goes on with {agent.apart.holder}", go_on(w, a)
    state = agent.state
    if state.phase == "detached":
        if engine.up:
            yield f"agent {a} attaches", ask(w, a, AttachAsked())
    elif not engine.up or engine.instance != agent.known:
        yield f"agent {a} notices", lose(w, a)
    elif state.owner is not None and not _lives(w, a, state.owner):
        yield f"agent {a} gives {state.owner} up", ask(w, a, AbortAsked(state.owner))
    if not engine.up:
        fresh = Worker(("",) * len(engine.workers[0].memory))
        restarted = Engine((fresh,) * len(engine.workers), instance=engine.instance + 1)
        yield f"engine {a} starts again", set_engine(w, a, restarted)


def _faults(w: World) -> Iterator[tuple[str, World]]:
    for t, trainer in enumerate(w.trainers):
        if trainer.phase not in ("idle", "dead"):
            dead = trainer._replace(phase="dead", tries=0, waits=frozenset())
            yield f"trainer {t} dies", set_trainer(w, t, dead)
        if trainer.phase == "write":
            yield f"trainer {t} waits no longer for its writes", abort(w, t)
            for rank in range(trainer.ranks) if trainer.ranks > 1 else ():
                yield f"rank {rank} of trainer {t} fails", rank_fails(w, t, rank)
    for call in w.calls:
        yield f"{call.name} is lost", answer(heard(w, call), call, ok=False)
        if call.agent in w.trainers[call.trainer].waits:
            yield f"{call.name} is not waited for", answer(w, call, ok=False)
        if w.agents[call.agent].up and (after := take(w, call)) is not None:
            yield f"{call.name} is heard and comes again", after
    for a, (agent, engine) in enumerate(zip(w.agents, w.engines, strict=True)):
        if agent.up:
            for keeps in ("all", "synced", "nothing"):
                yield f"agent {a} dies, {keeps} of its journal is left", drop(w, a, keeps)
            if agent.state.phase != "detached":
                yield f"agent {a} thinks its engine is gone", lose(w, a)
            owner = agent.state.owner
            if agent.work is None and owner is not None and _lives(w, a, owner):
                yield f"agent {a} gives {owner} up too early", ask(w, a, AbortAsked(owner))
        if engine.up:
            yield f"engine {a} dies", set_engine(w, a, engine._replace(up=False))
        if agent.up and agent.work is not None and engine.up:
            what = f"agent {a}: {agent.work[2][0].value}"
            for reached in range(len(engine.workers) + 1):
                yield f"{what} reaches {reached}, no answer", perform(w, a, reached=reached)
            yield f"{what} is late", perform(w, a, reached=0, late=True)
            if agent.work[2][0] is Effect.COMMIT and (after := perform_half(w, a)) is not None:
                yield f"{what} breaks off in one worker", after


def _lives(w: World, a: int, push: str) -> bool:
    """Whether anybody may still ask agent ``a`` something for this push."""
    apart = w.agents[a].apart
    return (
        any(t.push == push and t.phase not in ("idle", "dead") for t in w.trainers)
        or any(c.push == push for c in w.calls)
        or (apart is not None and apart.holder == push)
    )


def land(w: World, write: Write) -> World:
    """A write reaches its worker's memory and its message follows; or nobody is there."""
    w = w._replace(writes=w.writes - {write})
    engine = w.engines[write.agent]
    worker = engine.workers[write.worker]
    there = engine.up and engine.instance == write.instance
    open_ = worker.registration == write.registration
    trainer = w.trainers[write.trainer]
    waits = trainer.phase == "write" and trainer.push == write.push
    if not there or (w.fenced and not open_):
        return abort(w, write.trainer) if waits else w
    told = worker.told | {(write.version, write.rank)} if open_ else worker.told
    if worker.shadowed and worker.beside is not None:
        worker = worker._replace(beside=_part(worker.beside, write), told=told)
    else:
        worker = worker._replace(memory=_part(worker.memory, write), told=told)
    workers = (
        *engine.workers[: write.worker],
        worker,
        *engine.workers[write.worker + 1 :],
    )
    w = set_engine(w, write.agent, engine._replace(workers=workers))
    if waits and all_written(w, write):
        return written(w, write.trainer)
    return w


def all_written(w: World, write: Write) -> bool:
    """Whether this was the last write of all ranks of its push."""
    return not any(other.push == write.push for other in w.writes)


def _part(memory: tuple[str, ...], write: Write) -> tuple[str, ...]:
    return (*memory[: write.rank], write.push, *memory[write.rank + 1 :])


def _hear(w: World, command: Command) -> World:
    w = w._replace(late=w.late - {command})
    engine = w.engines[command.agent]
    if not engine.up or engine.instance != command.instance:
        return w
    if w.ordered:
        return set_engine(w, command.agent, carry_out(engine, command, None)[0])
    after, _ = carry_out(engine, command._replace(turn=engine.turn), None)
    return set_engine(w, command.agent, after._replace(turn=engine.turn))
