"""The events of the agent's state machine, :mod:`weightsync.state`.

Those called ``...Asked`` are what a caller wants and may be refused; the others tell what became
of an effect, or of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

# ------------------------------------------------------------------ what callers ask for


@dataclass(frozen=True, slots=True)
class AttachAsked:
    """(Re)join the engine."""


@dataclass(frozen=True, slots=True)
class PauseAsked:
    """Stop generation; ``push_id`` None: by hand."""

    push_id: str | None


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    """Start generation; ``push_id`` None: by hand."""

    push_id: str | None


@dataclass(frozen=True, slots=True)
class InitAsked:
    """Rendezvous, round 1: a new epoch."""

    session: str


@dataclass(frozen=True, slots=True)
class ConnectAsked:
    """Rendezvous, round 2."""

    session: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BeginAsked:
    """The writes come next; ``shadow``: the engine may serve on until they are done."""

    session: str
    epoch: int
    push_id: str
    version: int
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class PrepareAsked:
    """The writes to shadow and staging memory are done: check them."""

    session: str
    epoch: int
    push_id: str
    version: int


@dataclass(frozen=True, slots=True)
class CommitAsked:
    """The writes are done."""

    session: str
    epoch: int
    push_id: str
    version: int


@dataclass(frozen=True, slots=True)
class AbortAsked:
    """Give the push up.  Also what the agent asks itself when a push fell silent."""

    push_id: str


@dataclass(frozen=True, slots=True)
class RollbackAsked:
    """Put the version before back; ``push_id`` has paused the engine for it."""

    push_id: str


@dataclass(frozen=True, slots=True)
class ReloadAsked:
    """Load the engine's own checkpoint again; ``push_id`` has paused the engine for it."""

    push_id: str


# ------------------------------------------------------------------ what became of it


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine does not answer, or is another process than before."""


@dataclass(frozen=True, slots=True)
class Attached:
    """All workers said what they hold.

    ``same``: they are the processes that the agent knew before.  ``rollback_to`` and
    ``rolled_back_from`` are those of :class:`weightsync.state.AgentState`.
    """

    versions: frozenset[int]
    dirty: bool
    paused: bool
    epoch: int
    same: bool
    rollback_to: int | None = None
    rolled_back_from: int = 0


@dataclass(frozen=True, slots=True)
class Paused:
    """Generation stopped; the engine is drained and its devices idle."""

    push_id: str | None


@dataclass(frozen=True, slots=True)
class PauseFailed:
    """The engine may or may not be paused."""

    push_id: str | None


@dataclass(frozen=True, slots=True)
class Resumed:
    """Generation runs."""


@dataclass(frozen=True, slots=True)
class ResumeFailed:
    """The engine may or may not generate."""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """Every worker made its layout for this session's epoch.

    ``rollback_to``: the version whose bytes they still keep.
    """

    session: str
    epoch: int
    rollback_to: int | None = None


@dataclass(frozen=True, slots=True)
class Connected:
    """Every worker took in the ranks."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The version is real on every worker.

    ``epoch_over``: some have ended the epoch with it.  ``rollback_to``: the version before, if all
    keep it.
    """

    version: int
    epoch_over: bool = False
    rollback_to: int | None = None


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Every worker has the version before again; the newest one that was given up for it."""

    version: int
    rolled_back_from: int


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Every worker has what the engine was started with."""


@dataclass(frozen=True, slots=True)
class PushFailed:
    """Begin, prepare, commit, rollback or reload failed.

    ``reachable``: every worker answered, so they can be asked.
    """

    reachable: bool


@dataclass(frozen=True, slots=True)
class Aborted:
    """What the workers hold after an abort; no ``versions``: they could not be asked.

    ``rollback_to``: the version whose bytes all of them still keep.
    """

    versions: frozenset[int]
    dirty: bool
    rollback_to: int | None = None


Ask = (
    AttachAsked | PauseAsked | ResumeAsked | InitAsked | ConnectAsked | BeginAsked | PrepareAsked
    | CommitAsked | AbortAsked | RollbackAsked | ReloadAsked
)  # fmt: skip
Outcome = (
    EngineLost | Attached | Paused | PauseFailed | Resumed | ResumeFailed | SessionOpened
    | Connected | Committed | RolledBack | Reloaded | PushFailed | Aborted
)  # fmt: skip
Event = Ask | Outcome
