"""What a publisher can be told, and the one place on this side that reads the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Deadlines(BaseModel):
    """How long a publisher waits, in seconds.

    Whatever moves or checks bytes gets its base and, on top of it, the time that those bytes take
    at ``floor_bytes_per_s`` (WS-6).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_s: Seconds = 5.0
    """Until an agent's port accepts a connection."""
    status_s: Seconds = 15.0
    """``GET /status``."""
    check_s: Seconds = 2.0
    """``GET /status`` in :meth:`weightsync_client.publisher.Publisher.check`, in every step."""
    rendezvous_s: Seconds = 300.0
    """Each of ``POST /init_transfer`` and ``POST /connect``: the engine traces and registers."""
    pause_s: Seconds = 60.0
    """``POST /pause``: running requests are drained or parked."""
    begin_s: Seconds = 60.0
    """``POST /begin_update``: every worker checks that no kernel tensor moved."""
    write_s: Seconds = 30.0
    """Base of the wait for the writes."""
    commit_s: Seconds = 120.0
    """Base of ``POST /commit_update``: every worker compares digests and installs."""
    resume_s: Seconds = 60.0
    """``POST /resume``."""
    abort_s: Seconds = 30.0
    """``POST /abort_update``, after a failure."""
    ranks_s: Seconds = 600.0
    """How far the trainer's ranks may be apart when they meet in a push, besides their work."""
    grace_s: Seconds = 5.0
    """What an answer may take longer than the deadline that the agent itself was given."""
    floor_bytes_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100e6
    """The slowest rate that still counts as progress, per worker."""

    def for_bytes(self, base_s: float, nbytes: int) -> float:
        """Seconds for what starts in ``base_s`` and then moves ``nbytes``, a day at most."""
        return min(base_s + nbytes / self.floor_bytes_per_s, 86_400.0)


def token_from_env() -> str | Path | None:
    """The agents' bearer token in ``WEIGHTSYNC_TOKEN``, or its file in ``WEIGHTSYNC_TOKEN_FILE``.

    None where both are unset or empty.
    """
    file = os.environ.get("WEIGHTSYNC_TOKEN_FILE")
    return os.environ.get("WEIGHTSYNC_TOKEN") or (Path(file) if file else None)


class TlsFiles(NamedTuple):
    """PEM files: the CA of the agents, and the certificate and key that they are shown."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


def tls_from_env() -> TlsFiles:
    """The files that ``WEIGHTSYNC_CA_FILE``, ``..._CERT_FILE`` and ``..._KEY_FILE`` name."""
    named = (os.environ.get(f"WEIGHTSYNC_{what}_FILE") for what in ("CA", "CERT", "KEY"))
    return TlsFiles(*(Path(name) if name else None for name in named))
