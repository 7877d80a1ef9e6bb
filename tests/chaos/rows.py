"""The fault suite's table: what goes wrong when, and what becomes of it.

``docs/failure-model.md`` shows every row; a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple

from weightsync.protocol import PushMode

#: what a push may end with for its trainer
LOST = {"AgentUnreachableError"}
LATE = {"DeadlineError"}
DEAD = {
    "TransportError", "PeerLostError", "EngineDetachedError", "EngineError", "DeadlineError"
}  # fmt: skip
OVER = {"EngineTornError", "StaleEpochError", "StateError", "NoSessionError"}
GONE = {"EngineDetachedError", "EngineTornError", "StaleEpochError", "NoSessionError"}
DONE = {"done"}

_TOLD = {
    "AgentUnreachableError": "agent unreachable",
    "DeadlineError": "deadline",
    "TransportError": "transfer failed",
    "PeerLostError": "peer lost",
    "EngineDetachedError": "engine gone",
    "EngineTornError": "engine torn",
    "EngineError": "engine error",
    "StaleEpochError": "given up",
    "StateError": "given up",
    "NoSessionError": "given up",
    "done": "success",
}
_ENDS = {
    "old": "serves the version before",
    "new": "serves the new version",
    "torn": "torn, serves nothing",
    "started": "serves what it was started with",
    "paused": "paused, a person resumes it",
}


class Row(NamedTuple):
    """One fault.

    Attributes:
        who: Process or link.
        how: What is done to it.
        when: The moment of the push, as :func:`tests.chaos.moments.strike` takes it.
        told: What the push may end with for its trainer; nothing: it is dead.
        ends: What the engine is when all have settled, of those that may be.  ``old`` and ``new``:
            it serves the version before or the pushed one; ``torn``: it serves nothing;
            ``started``: it serves what it was started with; ``paused``: it has the old version and
            waits for a person.
        loses: Of a link that loses answers: how many; None: all.
    """

    who: str
    how: str
    when: str
    told: set[str]
    ends: set[str]
    loses: int | None = None

    @property
    def id(self) -> str:
        how = self.how if self.loses is None else f"{self.how}-once"
        return f"{self.who}-{how}-{self.when}".replace(" ", "-")

    @property
    def mode(self) -> PushMode:
        """Of the push."""
        return "shadow" if self.who.startswith("shadow") else "direct"

    @property
    def line(self) -> str:
        """The row in docs/failure-model.md."""
        told = sorted({_TOLD[name] for name in self.told}) or ["–"]
        ends = " or ".join(text for name, text in _ENDS.items() if name in self.ends)
        when = self.when if self.when.startswith(("in ", "mid")) else f"before {self.when}"
        return f"| {when} | {', '.join(told)} | {ends} | `{self.id}` |"


PROCESSES = [
    # the trainer: nothing is told to a dead one
    Row("trainer", "kill", "fill", set(), {"old"}),
    Row("trainer", "kill", "pause", set(), {"old"}),
    Row("trainer", "kill", "begin", set(), {"old"}),
    Row("trainer", "kill", "write", set(), {"torn"}),
    Row("trainer", "kill", "mid-write", set(), {"torn"}),
    Row("trainer", "kill", "commit", set(), {"torn"}),
    Row("trainer", "kill", "in commit", set(), {"new"}),
    Row("trainer", "kill", "resume", set(), {"new"}),
    Row("trainer", "kill", "in resume", set(), {"new"}),
    Row("trainer", "stop", "fill", DONE, {"new"}),
    Row("trainer", "stop", "begin", OVER, {"old"}),
    Row("trainer", "stop", "write", OVER, {"torn"}),
    Row("trainer", "stop", "mid-write", OVER | DEAD, {"torn"}),
    Row("trainer", "stop", "commit", OVER, {"torn"}),
    Row("trainer", "stop", "resume", DONE, {"new"}),
    # the agent
    Row("agent", "kill", "fill", LOST, {"old"}),
    Row("agent", "kill", "pause", LOST, {"old"}),
    Row("agent", "kill", "begin", LOST, {"old"}),
    Row("agent", "kill", "write", LOST, {"torn"}),
    Row("agent", "kill", "mid-write", LOST, {"torn"}),
    Row("agent", "kill", "commit", LOST, {"torn"}),
    Row("agent", "kill", "in begin", LOST, {"old", "torn"}),
    Row("agent", "kill", "in commit", LOST, {"new", "torn"}),
    Row("agent", "kill", "resume", LOST, {"new"}),
    Row("agent", "stop", "fill", LATE, {"old"}),
    Row("agent", "stop", "begin", LATE, {"old", "torn"}),
    Row("agent", "stop", "mid-write", LATE, {"torn"}),
    Row("agent", "stop", "commit", LATE, {"new", "torn"}),
    Row("agent", "stop", "resume", LATE, {"new"}),
    # the engine and its worker
    Row("engine", "kill", "fill", DEAD, {"started"}),
    Row("engine", "kill", "begin", DEAD, {"started"}),
    Row("engine", "kill", "write", DEAD, {"started"}),
    Row("engine", "kill", "mid-write", DEAD, {"started"}),
    Row("engine", "kill", "commit", DEAD, {"started"}),
    Row("engine", "kill", "in commit", DEAD, {"started"}),
    Row("engine", "kill", "resume", DEAD, {"started"}),
    Row("engine", "stop", "pause", LATE, {"old"}),
    Row("engine", "stop", "begin", LATE, {"torn"}),
    Row("engine", "stop", "mid-write", DEAD, {"torn"}),
    Row("engine", "stop", "commit", LATE, {"torn"}),
    Row("engine", "stop", "resume", LATE, {"new"}),
]

#: in mode ``shadow``, whose phases are fill, begin, write, prepare, pause, commit, resume
SHADOW = [
    Row("shadow trainer", "kill", "write", set(), {"old"}),
    Row("shadow trainer", "kill", "prepare", set(), {"old"}),
    Row("shadow trainer", "kill", "commit", set(), {"old"}),
    Row("shadow trainer", "kill", "resume", set(), {"new"}),
    Row("shadow agent", "kill", "write", LOST, {"old"}),
    Row("shadow agent", "kill", "pause", LOST, {"old"}),
    Row("shadow agent", "kill", "commit", LOST, {"old"}),
    Row("shadow agent", "kill", "resume", LOST, {"new"}),
    Row("shadow engine", "kill", "write", DEAD, {"started"}),
    Row("shadow engine", "kill", "commit", DEAD, {"started"}),
    Row("shadow engine", "stop", "prepare", LATE, {"old"}),
    Row("shadow engine", "stop", "pause", LATE, {"old", "torn"}),
    Row("shadow engine", "stop", "commit", LATE, {"torn"}),
]

#: between trainer and agent
CONTROL = [
    Row("control", "refuse", "fill", LOST, {"old"}),
    Row("control", "refuse", "begin", LOST, {"old"}),
    Row("control", "refuse", "mid-write", LOST, {"torn"}),
    Row("control", "refuse", "commit", LOST, {"torn"}),
    Row("control", "refuse", "resume", LOST, {"new"}),
    Row("control", "stall", "pause", LATE, {"old"}),
    Row("control", "stall", "begin", LATE, {"old"}),
    Row("control", "stall", "commit", LATE, {"torn"}),
    Row("control", "stall", "resume", LATE, {"new"}),
    Row("control", "deaf", "pause", LOST, {"old"}),
    Row("control", "deaf", "begin", LOST, {"torn"}),
    Row("control", "deaf", "commit", LOST, {"new"}),
    Row("control", "deaf", "resume", LOST, {"new"}),
    Row("control", "deaf", "pause", DONE, {"new"}, loses=1),
    Row("control", "deaf", "begin", DONE, {"new"}, loses=1),
    Row("control", "deaf", "commit", DONE, {"new"}, loses=1),
    Row("control", "deaf", "resume", DONE, {"new"}, loses=1),
    Row("control", "slow", "fill", DONE, {"new"}),
]

#: between agent and engine
ENGINE = [
    Row("engine link", "refuse", "fill", GONE, {"old"}),
    Row("engine link", "refuse", "begin", GONE, {"old"}),
    Row("engine link", "refuse", "write", GONE, {"torn"}),
    Row("engine link", "refuse", "commit", GONE, {"torn"}),
    Row("engine link", "refuse", "resume", GONE, {"new"}),
    Row("engine link", "stall", "pause", LATE, {"old"}),
    Row("engine link", "stall", "begin", LATE, {"torn"}),
    Row("engine link", "stall", "commit", LATE | GONE, {"torn"}),
    Row("engine link", "stall", "resume", LATE | GONE, {"new"}),
    Row("engine link", "deaf", "begin", GONE | {"EngineError"}, {"torn"}),
    Row("engine link", "deaf", "commit", GONE | {"EngineError"}, {"new", "torn"}),
    Row("engine link", "deaf", "resume", GONE | {"EngineError"}, {"new"}),
]
