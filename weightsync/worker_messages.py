"""Bodies of the calls between agent and worker, packed with :mod:`weightsync.codec`."""

from __future__ import annotations

from dataclasses import dataclass, field

from weightsync.layout import WorkerLayout
from weightsync.manifest import TensorSpec
from weightsync.process import Writer


@dataclass(frozen=True, slots=True)
class DescribeReply:
    """What a worker is and what it holds.

    ``dirty``: a push began and did not commit; the live weights may not be whole.
    ``checkpoint``: whether the weights that it started with are on disk, to prove against.
    ``rollback_to``: the version that a rollback would put back.  ``rolled_back_from``: the newest
    version that was given up; 0: none.
    """

    place: str
    instance: str
    engine: str
    engine_version: str
    version: int
    dirty: bool
    epoch: int
    pid: int
    checkpoint: bool
    rollback_to: int | None = None
    rolled_back_from: int = 0


@dataclass(frozen=True, slots=True)
class AttachBody:
    """``proof``: ``windows`` or ``full``.  ``shadow_device``: as in :class:`LayoutBody`."""

    proof: str
    shadow_device: str = "same"


@dataclass(frozen=True, slots=True)
class Headroom:
    """What pushes in shadow mode take of one kind of memory, with a shadow of all weights.

    ``kind``: ``VRAM`` or ``DRAM``.  ``held_nbytes``: what they have of it already.
    ``free_nbytes``: what is left for the rest; None: nobody knows.
    """

    kind: str
    needed_nbytes: int
    held_nbytes: int
    free_nbytes: int | None


@dataclass(frozen=True, slots=True)
class AttachReply:
    """Counts of kernel tensors by mode, what was refused, and warnings for a person.

    ``headroom``: of each kind of memory that a shadow would take.
    """

    kernel_tensors: int
    direct: int
    staged: int
    refusals: list[tuple[str, str]]
    warnings: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    headroom: list[Headroom] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LayoutBody:
    """Trace and register for this manifest under a new epoch.

    ``mode`` ``shadow``: what can be written directly gets a shadow on ``shadow_device`` (``same``:
    where it lies; ``cpu``) of at most ``max_shadow_nbytes``; None: all of it.
    """

    epoch: int
    session: str
    manifest: tuple[TensorSpec, ...]
    mode: str = "direct"
    shadow_device: str = "same"
    max_shadow_nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class LayoutReply:
    """Where the bytes go, and how to reach this worker.

    ``rollback_to``: the version whose bytes are still kept.
    """

    transport: str
    metadata: bytes
    layout: WorkerLayout
    rollback_to: int | None = None


@dataclass(frozen=True, slots=True)
class RankWrites:
    """What one rank will write here: (region, offset, nbytes) each."""

    rank: int
    metadata: bytes
    writes: list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ConnectBody:
    """Rendezvous, round 2.  ``fenced``: who must not be able to write here any more."""

    epoch: int
    ranks: list[RankWrites]
    fenced: list[Writer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BeginBody:
    """The writes come next.

    ``live``: the engine is paused, they may land in live memory.
    """

    epoch: int
    version: int
    push_id: str
    live: bool = True


@dataclass(frozen=True, slots=True)
class RankDigestsBody:
    """One 16-byte digest a write that the rank declared at connect, in that order."""

    rank: int
    digests: list[bytes]


@dataclass(frozen=True, slots=True)
class PrepareBody:
    """Check what was written to shadow and staging memory, before the pause; as CommitBody."""

    epoch: int
    version: int
    push_id: str
    ranks: list[RankDigestsBody]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PrepareReply:
    """Where the time went."""

    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class CommitBody:
    """Check, install, refresh.  What was prepared needs no digests."""

    epoch: int
    version: int
    push_id: str
    ranks: list[RankDigestsBody]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CommitReply:
    """The version that is now real here, and where the time went.

    ``epoch_over``: the layout is another one now, the next push needs a new rendezvous.
    ``rollback_to``: the version that a rollback would put back.
    """

    version: int
    seconds: dict[str, float]
    epoch_over: bool = False
    rollback_to: int | None = None


@dataclass(frozen=True, slots=True)
class AbortBody:
    """Give the push up."""

    push_id: str


@dataclass(frozen=True, slots=True)
class AbortReply:
    """``dirty``: live weights may have been written.

    ``rollback_to``: the version whose bytes are still kept, all of them.
    """

    dirty: bool
    version: int
    rollback_to: int | None = None


@dataclass(frozen=True, slots=True)
class RollbackBody:
    """Put back the bytes of version ``to``."""

    to: int


@dataclass(frozen=True, slots=True)
class RollbackReply:
    """The version that is real here again, and the newest one that was given up for it."""

    version: int
    rolled_back_from: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class ReloadReply:
    """The checkpoint is served again, as version 0; where the time went."""

    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class ChecksumsReply:
    """SHA-256 (hex) of every final kernel tensor's bytes; of opaque ones, of what they compute."""

    sha256: dict[str, str]


@dataclass(frozen=True, slots=True)
class VerifyBody:
    """Compare what is there with what the ranks of this epoch would write."""

    epoch: int
    ranks: list[RankDigestsBody]


@dataclass(frozen=True, slots=True)
class VerifyReply:
    """How many kernel tensors were compared; (kernel tensor, what is other than expected)."""

    kernel_tensors: int
    differs: list[tuple[str, str]]
