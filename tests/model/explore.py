"""Every world that can be reached, and what must hold in each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tests.model.agents import ask, perform, take
from tests.model.records import Trainer, World
from tests.model.trainers import start
from tests.model.world import land, successors, unasked
from weightsync.state_events import ResumeAsked

#: steps in which a whole push must have succeeded, whatever was before
WITHIN = 60


@dataclass
class Explored:
    """``wrong``: what does not hold, and the shortest way there."""

    worlds: int = 0
    moves: int = 0
    pushes: int = 0
    torn: int = 0
    healed_in: int = 0
    by_hand: int = 0
    wrong: str = ""
    way: list[str] = field(default_factory=list)


def explore(first: World, *, most: int = 10_000_000) -> Explored:
    """Breadth first, until something is wrong or nothing is left."""
    found = Explored()
    came: dict[World, tuple[World, str] | None] = {first: None}
    healed: dict[object, int] = {}
    queue = deque([first])

    def stop(world: World, wrong: str) -> Explored:
        found.wrong = wrong
        at: World | None = world
        while at is not None and (before := came[at]) is not None:
            at, name = before
            found.way.insert(0, name)
        return found

    while queue:
        world = queue.popleft()
        found.worlds += 1
        found.pushes = max(found.pushes, sum(t.done for t in world.trainers))
        found.torn += any(a.state.phase == "torn" for a in world.agents)
        if wrong := what_is_wrong(world):
            return stop(world, wrong)
        rest = (world.agents, world.engines)
        if rest not in healed:
            healed[rest], by_hand = heal(world)
            found.healed_in = max(found.healed_in, healed[rest])
            found.by_hand += by_hand
            if healed[rest] > WITHIN:
                return stop(world, "no whole push can follow")
            if by_hand and not any(agent.forgot for agent in world.agents):
                return stop(world, "only a person can help")
        for name, after in successors(world):
            found.moves += 1
            if after in came:
                continue
            came[after] = world, name
            if wrong := what_went_wrong(world, after):
                return stop(after, wrong)
            if len(came) > most:
                return stop(after, f"more than {most} worlds")
            queue.append(after)
    return found


def what_is_wrong(w: World) -> str:
    """What must hold in every world; "" if it does."""
    for a, (agent, engine) in enumerate(zip(w.agents, w.engines, strict=True)):
        if engine.up and not engine.paused and not engine.whole:
            return f"engine {a} serves while it is torn"
        ready = agent.up and agent.state.phase == "ready" and agent.known == engine.instance
        if ready and engine.up and not engine.whole:
            return f"agent {a} calls a torn engine ready"
        if ready and engine.up and engine.workers[0].version != agent.state.version:
            return f"agent {a} tells another version than engine {a} has"
    return ""


def what_went_wrong(before: World, after: World) -> str:
    """What must hold of every step."""
    for a, (old, new) in enumerate(zip(before.engines, after.engines, strict=True)):
        if old.instance != new.instance or not (old.up and new.up):
            continue
        for was, now in zip(old.workers, new.workers, strict=True):
            if now.given_up > was.given_up:
                if was.kept is None or (now.version, now.memory) != was.kept:
                    return f"a worker of engine {a} rolled back to what it never served"
                continue
            if now.version < was.version:
                return f"a worker of engine {a} went back to version {now.version}"
            if was.version < now.version <= now.given_up:
                return f"a worker of engine {a} has version {now.version} again, which was given up"
            if now.version == was.version and now.dirty < was.dirty:
                return f"a worker of engine {a} calls itself whole without a commit"
    return ""


def heal(w: World) -> tuple[int, bool]:
    """Steps until a whole push has succeeded when nothing more goes wrong, and if a person helped.

    Everybody who was pushing is gone, with whatever they had sent.
    """
    agents = tuple(
        agent._replace(
            work=agent.work and (None, *agent.work[1:]),
            apart=agent.apart and agent.apart._replace(call=None),
        )
        for agent in w.agents
    )
    ranks = len(w.engines[0].workers[0].memory)
    w = World((Trainer("z", tries=1, ranks=ranks),), agents, w.engines, fenced=w.fenced)
    by_hand = False
    for steps in range(1, WITHIN + 1):
        trainer = w.trainers[0]
        if trainer.done:
            served = {(e.paused, e.whole, e.workers[0].memory[0]) for e in w.engines}
            return (steps if served == {(False, True, trainer.push)} else WITHIN + 1), by_hand
        before = w
        if trainer.tries and (a := _restless(w)) is not None:
            w, helped = _settle(w, a)
            by_hand = by_hand or helped
        else:
            w = _push_on(w)
        if w == before:
            break
    return WITHIN + 1, by_hand


def _push_on(w: World) -> World:
    if w.trainers[0].tries:
        return start(w, 0)
    for a, agent in enumerate(w.agents):
        if agent.work is not None:
            return perform(w, a)
    if w.calls:
        call = min(w.calls)
        after = take(w, call) or w
        return after._replace(calls=after.calls - {call})
    return land(w, min(w.writes)) if w.writes else w


def _restless(w: World) -> int | None:
    """An agent that is still busy with what was before."""
    for a, (agent, engine) in enumerate(zip(w.agents, w.engines, strict=True)):
        idle = agent.work is None and agent.apart is None
        there = agent.up and engine.up and agent.known == engine.instance and idle
        if (
            not there
            or agent.state.owner is not None
            or agent.state.phase in ("detached", "paused")
        ):
            return a
    return None


def _settle(w: World, a: int) -> tuple[World, bool]:
    """What agent ``a``, its engine and whoever starts them do by themselves; or a person."""
    for _, after in unasked(w, a):
        return after, False
    # an agent that was restarted cannot know who paused the engine
    return ask(w, a, ResumeAsked(None)), True
