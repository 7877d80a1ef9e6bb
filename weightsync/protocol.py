"""The control messages between trainer, agent and worker.  docs/protocol.md tells their meaning.

HTTP bodies are JSON.  A field of type :data:`Packed` is a string made by
:func:`weightsync.codec.pack`, for what would be megabytes of JSON.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from weightsync.manifest import Manifest, TensorSpec
from weightsync.process import Writer

PROTOCOL_VERSION = 1
#: what a trainer proves with that a session is its own; see weightsync_server.agent.session_guard
SESSION_SECRET_HEADER = "X-Weightsync-Session-Secret"  # noqa: S105

Packed = str
Name = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
_MAX_RANKS = 1 << 20
Rank = Annotated[int, Field(ge=0, lt=_MAX_RANKS)]
Version = Annotated[int, Field(ge=0, lt=1 << 62)]
PauseMode = Literal["keep", "wait", "abort"]
#: whether a push lands in live memory or beside it
PushMode = Literal["direct", "shadow"]


def faults(error: ValidationError) -> str:
    """Where the first mistakes of a message are, in one line; what was sent is not repeated."""
    wrong = error.errors(include_url=False, include_input=False)[:4]
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in wrong)


class Message(BaseModel):
    """Base of all messages: unknown fields are errors, nothing changes after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------- trainer <-> agent


class TensorModel(Message):
    """One checkpoint tensor."""

    name: Name
    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 62)]], Field(max_length=16)]
    alias_of: str = ""


class ManifestModel(Message):
    """What the trainer can make, in plain JSON."""

    tensors: list[TensorModel]

    def to_manifest(self) -> Manifest:
        """The core record.

        Raises:
            ManifestError: See :class:`weightsync.manifest.Manifest`.
        """
        return Manifest.of(
            TensorSpec(t.name, t.dtype, tuple(t.shape), t.alias_of) for t in self.tensors
        )


class PauseRequest(Message):
    """``POST /pause``.  Without ``push_id`` it is by hand: only a resume by hand ends it."""

    mode: PauseMode = "keep"
    timeout_s: Seconds = 60.0
    push_id: Id | None = None


class ResumeRequest(Message):
    """``POST /resume``."""

    push_id: Id | None = None


class InitTransferRequest(Message):
    """``POST /init_transfer``: rendezvous, round 1.

    ``manifest`` is either plain JSON or packed ``tuple[TensorSpec, ...]``.  ``mode`` ``shadow``:
    what could land in live memory lands in a copy of it.
    """

    protocol_version: int
    session: Id
    manifest: ManifestModel | Packed
    world_size: Annotated[int, Field(ge=1, le=_MAX_RANKS)] = 1
    timeout_s: Seconds = 300.0
    mode: PushMode = "direct"


class WorkerOffer(Message):
    """What one worker offers: ``layout`` is a packed ``WorkerLayout``, ``metadata`` base64."""

    place: str
    transport: str
    metadata: str
    layout: Packed
    direct: int
    staged: int
    nbytes: int
    shadow: int = 0


class InitTransferResponse(Message):
    """Answer to ``POST /init_transfer``."""

    session: Id
    epoch: int
    version: Version
    workers: list[WorkerOffer]


class RankOffer(Message):
    """One writing rank.

    ``writes[w]`` is, for worker ``w`` of the init_transfer answer, a packed
    ``list[tuple[int, int, int]]`` of (region, offset, nbytes): what this rank will write there.
    An empty string: it writes nothing there.  ``writer`` is its process.
    """

    rank: Rank
    metadata: str
    writes: list[Packed]
    writer: Writer | None = None


class ConnectRequest(Message):
    """``POST /connect``: rendezvous, round 2."""

    session: Id
    epoch: int
    ranks: Annotated[list[RankOffer], Field(min_length=1)]
    timeout_s: Seconds = 300.0


class BeginRequest(Message):
    """``POST /begin_update``: the writes come next.

    ``mode`` ``direct``: the engine is paused.  ``shadow``: it may serve on; what is written before
    the pause goes to shadow and staging memory alone.  ``pause``: pause the engine first, as
    ``POST /pause`` of this push would; an error says in its context's ``step`` whose it is.
    """

    session: Id
    epoch: int
    push_id: Id
    version: Version
    reset_prefix_cache: bool = True
    timeout_s: Seconds = 60.0
    mode: PushMode = "direct"
    pause: PauseMode | None = None
    pause_timeout_s: Seconds = 60.0


class RankDigests(Message):
    """``digests[w]``: packed ``list[bytes]``, 16 bytes for each of ``RankOffer.writes[w]``."""

    rank: Rank
    digests: list[Packed]


class PrepareRequest(Message):
    """``POST /prepare_commit``: the writes to shadow and staging memory have completed.

    ``ranks`` as in :class:`CommitRequest`: the digests of all writes.
    """

    session: Id
    epoch: int
    push_id: Id
    version: Version
    ranks: list[RankDigests]
    timeout_s: Seconds = 300.0


class CommitRequest(Message):
    """``POST /commit_update``: all writes have completed at the trainer.

    ``ranks`` may be empty where all that was written was prepared.  ``pause``: pause the engine
    first, as ``POST /pause`` of this push would, unless that was done; an error says in its
    context's ``step`` whose it is.  ``resume``: resume the engine then, as ``POST /resume`` of this
    push would; if that fails the answer's state is ``paused``.
    """

    session: Id
    epoch: int
    push_id: Id
    version: Version
    ranks: list[RankDigests]
    timeout_s: Seconds = 300.0
    pause: PauseMode | None = None
    pause_timeout_s: Seconds = 60.0
    resume: bool = False


class AbortRequest(Message):
    """``POST /abort_update``: give the push up.  ``reason`` is for people.

    ``released``: the calling process has given up all handles that it could write with.
    """

    session: Id
    push_id: Id
    reason: Annotated[str, StringConstraints(max_length=4096)] = ""
    released: Writer | None = None


class RollbackRequest(Message):
    """``POST /rollback``: serve the version before the last push in shadow mode.

    ``push_id``: of the push that holds the engine, or did: its repeat gets the same answer.
    ``version``: the one to be given up; refused if the engine has another.
    """

    push_id: Id | None = None
    version: Version | None = None
    mode: PauseMode = "keep"
    reset_prefix_cache: bool = True
    timeout_s: Seconds = 120.0


class ReloadRequest(Message):
    """``POST /reload``: serve the checkpoint again that the engine was started with."""

    mode: PauseMode = "keep"
    timeout_s: Seconds = 600.0


class VerifyRequest(Message):
    """``POST /verify``: does the engine hold what this rendezvous would write?  Changes nothing.

    ``ranks`` as in :class:`CommitRequest`.  What goes to staging memory has been written there.
    """

    session: Id
    epoch: int
    ranks: list[RankDigests]
    timeout_s: Seconds = 300.0


class Difference(Message):
    """A kernel tensor of one worker that is not what the rendezvous would make of it."""

    place: str
    tensor: str
    what: str


class VerifyResponse(Message):
    """Answer to ``POST /verify``: ``kernel_tensors`` were compared, over all workers."""

    version: Version
    kernel_tensors: int
    differs: list[Difference]


class AttachRequest(Message):
    """``POST /attach``: (re)join the engine.  ``proof`` ``full`` compares all bytes."""

    proof: Literal["windows", "full"] = "windows"
    timeout_s: Seconds = 600.0


class Span(Message):
    """Something that the agent did for a call, or the worker at ``place``.

    ``start_s`` counts from the moment that the agent took the call.
    """

    place: str = ""
    name: str
    start_s: float
    seconds: float


class StepResponse(Message):
    """Answer to pause, resume, begin, prepare, commit, abort, rollback and reload.

    ``seconds`` holds the parts that the agent and its slowest worker measured, ``spans`` when what
    went on, at each worker too.
    """

    state: str
    version: Version
    seconds: dict[str, float] = {}
    spans: list[Span] = []


class Refusal(Message):
    """A kernel tensor that cannot be written, and why."""

    tensor: str
    reason: str


# ---------------------------------------------------------------- agent <-> worker


class WorkerCommand(Message):
    """One call of the agent to every worker, fanned out by the engine.

    The worker answers by ``POST reply_url`` with a :class:`WorkerReply`, in at most ``timeout_s``.
    ``body`` is for all workers; where it differs (connect and commit to more than one worker),
    ``bodies`` holds one for each place instead.  ``engine`` is what the agent numbers the engine
    by: it becomes part of the worker's place.  ``turn``: of rollback and reload, what the engine's
    server last answered; it passes them on only if no pause or resume was heard since.
    """

    call_id: Id
    op: Literal[
        "describe",
        "attach",
        "layout",
        "connect",
        "begin",
        "prepare",
        "commit",
        "abort",
        "rollback",
        "reload",
        "close",
        "checksums",
        "verify",
    ]
    reply_url: str
    timeout_s: Seconds
    engine: Annotated[int, Field(ge=0)] = 0
    body: Packed = ""
    bodies: dict[str, Packed] = {}
    turn: str | None = None

    def body_for(self, place: str) -> Packed:
        """The packed body that the worker at ``place`` is meant to read."""
        return self.bodies.get(place, self.body)


class WorkerReply(Message):
    """A worker's answer: ``body`` on success, ``problem`` (problem details) on failure."""

    call_id: Id
    place: str
    instance: str
    body: Packed = ""
    problem: dict[str, object] | None = None
