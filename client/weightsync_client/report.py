"""What a push tells about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsync.errors import InputError
from weightsync_client.trace import Span, write_trace

#: the phases of a push, in order; ``paused`` spans pause to resume
PHASES = ("rendezvous", "fill", "pause", "begin", "write", "prepare", "commit", "resume")


@dataclass(frozen=True, slots=True)
class AgentOutcome:
    """One agent after the push.

    Attributes:
        url: The agent.
        state: Its state; ``unknown`` where it did not tell any more.
        version: What its engine has; 0 where it did not tell.
        seconds: What the agent and its slowest worker measured in commit, by part.
        ok: It has the version and serves it.  Else it was dropped:
        phase: in this phase,
        code: for an error of this code (docs/protocol.md),
        error: that reads so.
    """

    url: str
    state: str
    version: int
    seconds: dict[str, float] = field(default_factory=dict)
    ok: bool = True
    phase: str = ""
    code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class PushReport:
    """One push that committed, at as many agents as the policy wants.

    All times are seconds of the trainer's clock.

    Attributes:
        version: The version that the engines now serve.
        push_id: The push, as the agents' logs call it.
        nbytes: Bytes written, over all workers of all agents.
        rounds: In which they went through the slots of the rank with the most; 1: all fitted.
        rendezvous_s: A new epoch (0 when the last one's handles were used again).
        fill_s: Cast, pack, finite check and digests; the engine served meanwhile.
        pause_s: Until every engine was drained.
        begin_s: Until every worker had checked its tensors.
        write_s: First post to last completion; from the third round on the fill is part of it.
        prepare_s: Of shadow mode: digests; the engines served meanwhile, in begin and write too.
        commit_s: Digests, installation, prefix cache.
        resume_s: Until every engine generated again.
        paused_s: Pause sent to resume answered: what a request may have waited.
        total_s: The whole call of ``push``.
        agents: One outcome an agent; those that were dropped are not ``ok``.
        spans: On rank 0, what every rank, agent and worker did when; empty on other ranks.
    """

    version: int
    push_id: str
    nbytes: int
    rounds: int
    rendezvous_s: float
    fill_s: float
    pause_s: float
    begin_s: float
    write_s: float
    prepare_s: float
    commit_s: float
    resume_s: float
    paused_s: float
    total_s: float
    agents: tuple[AgentOutcome, ...]
    spans: tuple[Span, ...] = field(default=(), repr=False, compare=False)

    @property
    def rate_bytes_per_s(self) -> float:
        """Bytes written over the seconds of the write phase; 0 if nothing was written."""
        return self.nbytes / self.write_s if self.nbytes and self.write_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: every field but ``spans``, and the rate."""
        told = asdict(replace(self, spans=()))
        del told["spans"]
        return {**told, "rate_bytes_per_s": self.rate_bytes_per_s}

    def trace(self, path: str | Path) -> None:
        """Write the push's time line as a Chrome trace (``chrome://tracing``, ui.perfetto.dev).

        Every rank's work and its longest writes, every agent's steps and every worker's parts of
        them.  :mod:`weightsync_client.trace` tells how the clocks are brought together.

        Raises:
            InputError: This is not rank 0, or the file cannot be written.
        """
        if not self.spans:
            raise InputError("only rank 0 knows the time line", hint="call trace there")
        try:
            write_trace(Path(path), self.spans, self.to_dict())
        except OSError as error:
            raise InputError(f"cannot write {path}: {error}", hint="name another file") from error

    def __str__(self) -> str:
        parts = " · ".join(
            f"{p} {human_seconds(s)}" for p in PHASES if (s := getattr(self, f"{p}_s")) > 0
        )
        asked, served = len(self.agents), sum(agent.ok for agent in self.agents)
        return (
            f"v{self.version}  {human_bytes(self.nbytes)} to "
            f"{served if served == asked else f'{served} of {asked}'} "
            f"agent{'s' if asked > 1 else ''} in {human_seconds(self.total_s)}, "
            f"paused {human_seconds(self.paused_s)} "
            f"{f'{self.rounds} rounds ' if self.rounds > 1 else ''}"
            f"({human_bytes(self.rate_bytes_per_s)}/s)  {parts}"
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """A rank's write to memory of a worker that nothing reads, over a connection that is up.

    ``worker`` is the agent's URL and the worker's place.
    """

    worker: str
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up found; every worker of every agent that is ``ok`` was written to.

    Attributes:
        nbytes: Bytes that a push of these weights will write, over all workers of all agents.
        rounds: In which they will go through the slots of the rank with the most.
        rendezvous_s: A new epoch (0 when the last one's handles could be kept).
        total_s: The whole call.
        agents: One outcome an agent, with its state and version before any push.
        slowest: Each rank's slowest probe; none of a rank that will write nothing.
    """

    nbytes: int
    rounds: int
    rendezvous_s: float
    total_s: float
    agents: tuple[AgentOutcome, ...]
    slowest: tuple[Probe, ...]


def human_seconds(seconds: float) -> str:
    """``850 µs``, ``61.2 ms``, ``3.45 s``."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def human_bytes(nbytes: float) -> str:
    """``512 B``, ``1.2 MB``, ``16.4 GB``: powers of ten, as wires are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
