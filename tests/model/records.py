"""The parties of the small world, and what is under way between them."""

from __future__ import annotations

from typing import NamedTuple

from weightsync.state import AgentState, Effect
from weightsync.state_events import Ask

#: what a trainer has sent to an agent, at most
UNTOUCHED, PAUSING, BEGINNING, COMMITTING, COMMITTED, RESUMED = range(6)


class Worker(NamedTuple):
    """One worker.

    ``memory``: for each rank's part, the push whose bytes lie there, "" for those of the
    checkpoint; ``beside``: whose lie in the shadow, None: there is none; ``shadowed``: writes of
    the open epoch land there; ``registration``: of that epoch, never used twice; ``told``: version
    and rank.  ``kept``: the version before and what served then, as a rollback must bring it back;
    ``halves``: memory and shadow before an exchange that broke off.
    """

    memory: tuple[str, ...] = ("",)
    version: int = 0
    dirty: bool = False
    epoch: int = 0
    registration: int = 0
    beside: tuple[str, ...] | None = None
    shadowed: bool = False
    prepared: bool = False
    peer: str = ""
    push: tuple[str, int] | None = None
    begun: int = 0
    told: frozenset[tuple[int, int]] = frozenset()
    kept: tuple[int, tuple[str, ...]] | None = None
    halves: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    newest: int = 0
    given_up: int = 0


class Engine(NamedTuple):
    workers: tuple[Worker, ...]
    up: bool = True
    instance: int = 1
    paused: bool = False
    turn: int = 0
    opened: int = 0

    @property
    def whole(self) -> bool:
        return len({(part, w.version) for w in self.workers for part in w.memory}) == 1


class Call(NamedTuple):
    name: str
    trainer: int
    agent: int
    push: str
    session: str
    epoch: int
    version: int

    @property
    def key(self) -> tuple[str, str]:
        """What a repeat of it is known by."""
        return self.name, self.session if self.name in ("init", "connect") else self.push


class Command(NamedTuple):
    """What an agent asks its engine.

    ``instance``: of the process that was asked; ``turn``: of a pause or resume, which one it is;
    ``to``: of a rollback.
    """

    agent: int
    instance: int
    effect: Effect
    event: Ask
    epoch: int
    turn: int = 0
    to: int | None = None


class Write(NamedTuple):
    trainer: int
    agent: int
    worker: int
    rank: int
    instance: int
    registration: int
    push: str
    version: int


class Apart(NamedTuple):
    """A rollback that an agent is in the middle of: a pause, the rollback, a resume."""

    call: Call | None
    holder: str
    left: tuple[Ask, ...]
    busy: bool = False
    failed: bool = False


class Agent(NamedTuple):
    """``known``: the engine process that it is about; ``synced``: what surely is in its journal.

    ``forgot``: it once lost its journal.
    """

    state: AgentState = AgentState()
    up: bool = True
    known: int = 0
    turn: int | None = None
    work: tuple[Call | None, Ask, tuple[Effect, ...], bool] | None = None
    apart: Apart | None = None
    answered: frozenset[tuple[tuple[str, str], bool, int, int]] = frozenset()
    synced: tuple[AgentState, int] = (AgentState(), 0)
    forgot: bool = False


class Trainer(NamedTuple):
    """``mode``: ``shadow`` where the engines are well, see :func:`shadowed`."""

    name: str
    tries: int
    mode: str = "direct"
    ranks: int = 1
    phase: str = "idle"
    push: str = ""
    version: int = 0
    last: int = 0
    session: str = ""
    epochs: tuple[int, ...] = ()
    registrations: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    waits: frozenset[int] = frozenset()
    failed: bool = False
    done: int = 0


class World(NamedTuple):
    """``faults``: how many more may happen; ``rollbacks``: how many a person may still ask for.

    ``joined``: a pause brings its begin along, and a commit its resume.
    """

    trainers: tuple[Trainer, ...]
    agents: tuple[Agent, ...]
    engines: tuple[Engine, ...]
    calls: frozenset[Call] = frozenset()
    late: frozenset[Command] = frozenset()
    writes: frozenset[Write] = frozenset()
    faults: int = 0
    rollbacks: int = 0
    fenced: bool = True
    ordered: bool = True
    joined: bool = False


def new_world(
    *,
    trainers: int = 1,
    agents: int = 1,
    workers: int = 2,
    tries: int = 1,
    faults: int = 1,
    mode: str = "direct",
    ranks: int = 1,
    rollbacks: int = 0,
    fenced: bool = True,
    ordered: bool = True,
    joined: bool = False,
) -> World:
    """Engines that serve their checkpoints, agents that have not met them, trainers that wait."""
    return World(
        tuple(Trainer("ab"[t], tries, mode, ranks) for t in range(trainers)),
        tuple(Agent() for _ in range(agents)),
        tuple(Engine((Worker(("",) * ranks),) * workers) for _ in range(agents)),
        faults=faults,
        rollbacks=rollbacks,
        fenced=fenced,
        ordered=ordered,
        joined=joined,
    )


def shadowed(session: str) -> bool:
    """Whether a session's name says that its bytes land beside what serves."""
    return session.endswith("~")


def heard(w: World, call: Call) -> World:
    return w._replace(calls=w.calls - {call})


def set_trainer(w: World, t: int, trainer: Trainer) -> World:
    return w._replace(trainers=(*w.trainers[:t], trainer, *w.trainers[t + 1 :]))


def set_agent(w: World, a: int, agent: Agent) -> World:
    return w._replace(agents=(*w.agents[:a], agent, *w.agents[a + 1 :]))


def set_engine(w: World, a: int, engine: Engine) -> World:
    return w._replace(engines=(*w.engines[:a], engine, *w.engines[a + 1 :]))
