"""What ``GET /status`` tells."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from weightsync.protocol import PauseMode, Refusal


class Model(BaseModel):
    """Base of what the agent tells."""

    model_config = ConfigDict(extra="forbid")


class EngineStatus(Model):
    """An engine behind the agent; empty strings until it has been reached."""

    url: str
    name: str = ""
    version: str = ""
    model: str = ""
    instance: str = ""
    warnings: list[str] = []


class HeadroomStatus(Model):
    """What pushes in shadow mode take of one kind of memory: see ``worker_messages.Headroom``."""

    kind: str
    needed_nbytes: int
    held_nbytes: int
    free_nbytes: int | None


class WorkerStatus(Model):
    """One worker, as it last described itself."""

    place: str
    instance: str
    pid: int
    version: int
    dirty: bool
    checkpoint: bool = False
    kernel_tensors: int = 0
    direct: int = 0
    staged: int = 0
    refusals: list[Refusal] = []
    warnings: list[str] = []
    attach_seconds: dict[str, float] = {}
    shadow_headroom: list[HeadroomStatus] = []


class PhaseStatus(Model):
    """One phase of a push; ``seconds`` None: it runs, ``ok`` False: it failed or was cut off."""

    phase: str
    start_s: float
    seconds: float | None = None
    ok: bool = True


class PushStatus(Model):
    """One push, rollback or reload.

    ``outcome``: running, committed, rolled_back, reloaded, aborted, torn or engine_lost.
    """

    push_id: str
    version: int | None = None
    outcome: str = "running"
    mode: PauseMode = "keep"
    started_at: float
    seconds: dict[str, float] = {}
    phases: list[PhaseStatus] = []
    nbytes: int = 0
    ranks: int = 0


class ErrorStatus(Model):
    """Something that went wrong."""

    at: float
    what: str
    code: str
    detail: str
    hint: str = ""


class JournalStatus(Model):
    """What the agent keeps on disk.  ``trouble``: why it takes no push; empty: none."""

    path: str
    trouble: str = ""


class StatusResponse(Model):
    """Answer to ``GET /status``.  Times are seconds since 1970, durations seconds."""

    state: str
    version: int
    target: int | None
    committed: int
    committed_by: str | None
    lowest: int
    epoch: int
    session: str | None
    connected: bool
    pause_owner: str | None
    syncing: bool
    engines: list[EngineStatus]
    workers: list[WorkerStatus]
    last_push: PushStatus | None
    recent_pushes: list[PushStatus]
    last_errors: list[ErrorStatus]
    journal: JournalStatus
    rollback_to: int | None
    rolled_back_from: int
    uptime_s: float
    protocol_version: int
    weightsync_version: str
