"""What ``GET /status`` tells."""

from __future__ import annotations

import time

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


class WorkerStatus(Model):
    """One worker, as it last described itself."""

    place: str
    instance: str
    pid: int
    version: int
    dirty: bool
    kernel_tensors: int = 0
    direct: int = 0
    staged: int = 0
    refusals: list[Refusal] = []
    warnings: list[str] = []
    attach_seconds: dict[str, float] = {}


class PushStatus(Model):
    """One push.  ``outcome``: running, committed, aborted, torn or engine_lost."""

    push_id: str
    version: int | None = None
    outcome: str = "running"
    mode: PauseMode = "keep"
    started_at: float
    seconds: dict[str, float] = {}


class ErrorStatus(Model):
    """Something that went wrong."""

    at: float
    what: str
    code: str
    detail: str
    hint: str = ""


class StatusResponse(Model):
    """Answer to ``GET /status``.  Times are seconds since 1970, durations seconds."""

    state: str
    version: int
    target: int | None
    epoch: int
    session: str | None
    connected: bool
    pause_owner: str | None
    engines: list[EngineStatus]
    workers: list[WorkerStatus]
    last_push: PushStatus | None
    last_errors: list[ErrorStatus]
    uptime_s: float
    protocol_version: int
    weightsync_version: str


class PushClock:
    """Times the phases of the push that is running or was the last."""

    def __init__(self) -> None:
        self.last: PushStatus | None = None
        self._paused_at = 0.0
        self._begun_at = 0.0

    def paused(self, push_id: str, mode: PauseMode) -> None:
        """The push has just stopped the engine."""
        self.last = PushStatus(push_id=push_id, mode=mode, started_at=time.time())
        self._paused_at = time.monotonic()

    def begun(self, version: int) -> None:
        """The workers have just said that writing may start."""
        self._begun_at = time.monotonic()
        if self.last is not None:
            self.last.version = version

    def committing(self) -> None:
        """The trainer has just said that writing is done."""
        self.add("write", time.monotonic() - self._begun_at)

    def resumed(self) -> None:
        """The engine serves again."""
        if self.last is not None and "paused" not in self.last.seconds:
            self.add("paused", time.monotonic() - self._paused_at)

    def add(self, phase: str, seconds: float) -> None:
        """Seconds of one phase."""
        if self.last is not None:
            self.last.seconds[phase] = round(seconds, 6)

    def end(self, outcome: str) -> bool:
        """The push is over; whether that is news."""
        if self.last is None or self.last.outcome != "running":
            return False
        self.last.outcome = outcome
        return True
