"""What Prometheus gets to see of an agent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

import weightsync
from weightsync.protocol import PROTOCOL_VERSION
from weightsync.state import AgentState, Phase

#: 1 ms to 100 s, three a decade
_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100,
)  # fmt: skip
#: ranks with a time series of their own; the others are summed up as ``other``
_MAX_RANKS = 64


class Metrics:
    """The agent's metrics, in a registry of their own.  Used on the event loop only."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._state = Gauge(
            "weightsync_state", "1 for the state the agent is in", ["state"], registry=registry
        )
        self._version = Gauge(
            "weightsync_version", "Last version that was whole", registry=registry
        )
        self._epoch = Gauge("weightsync_epoch", "Last epoch given out", registry=registry)
        self._workers = Gauge("weightsync_workers", "Workers attached", registry=registry)
        self.ranks = Gauge(
            "weightsync_ranks", "Trainer ranks that write in the open epoch", registry=registry
        )
        self.pushes = Counter(
            "weightsync_pushes", "Pushes by how they ended", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "weightsync_phase_seconds",
            "Seconds of each phase of pushes, and of joining an engine",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.push_paused = Histogram(
            "weightsync_push_paused_seconds",
            "Seconds that the engine stood still for one push",
            buckets=_SECONDS,
            registry=registry,
        )
        self._paused = Counter(
            "weightsync_paused_seconds",
            "Seconds that the engine stood still, up to now, by who stopped it",
            ["by"],
            registry=registry,
        )
        self._received = Counter(
            "weightsync_received_bytes",
            "Bytes that committed pushes wrote",
            registry=registry,
        )
        self._from_rank = Counter(
            "weightsync_rank_received_bytes",
            "Bytes that committed pushes wrote, by the trainer rank that they came from",
            ["rank"],
            registry=registry,
        )
        self._to_worker = Counter(
            "weightsync_worker_received_bytes",
            "Bytes that committed pushes wrote, by the worker that they went to",
            ["place"],
            registry=registry,
        )
        self.write_rate = Gauge(
            "weightsync_write_bytes_per_second",
            "Bytes of the last push over the seconds between begin and commit",
            registry=registry,
        )
        self.staleness = Gauge(
            "weightsync_staleness_seconds",
            "Seconds since the last committed push, or since the agent started",
            registry=registry,
        )
        self.errors = Counter(
            "weightsync_errors", "Steps of the agent that failed", ["code"], registry=registry
        )
        self.call_errors = Counter(
            "weightsync_call_errors",
            "Calls that were answered with an error, refused ones too",
            ["call", "code"],
            registry=registry,
        )
        self.lost = Counter(
            "weightsync_engine_lost", "Times that the engine went away", registry=registry
        )
        self.journal_writable = Gauge(
            "weightsync_journal_writable",
            "1: the agent's journal can be written; 0: it cannot, and no push is taken",
            registry=registry,
        )
        self._certificate_ends = Gauge(
            "weightsync_certificate_ends_timestamp_seconds",
            "When the first certificate of a TLS file of the agent ends, in seconds since 1970",
            ["file"],
            registry=registry,
        )
        Gauge(
            "weightsync_build_info",
            "1, with the versions as labels",
            ["version", "protocol_version"],
            registry=registry,
        ).labels(weightsync.__version__, str(PROTOCOL_VERSION)).set(1)
        self._committed_at = self._looked_at = time.monotonic()
        self._stopped_by = ""
        for by in ("hand", "push"):
            self._paused.labels(by)

    def show(self, state: AgentState, workers: int) -> None:
        """Set the gauges to a new state."""
        self._count_paused()
        self._stopped_by = ""
        if state.phase in ("paused", "receiving", "torn"):
            self._stopped_by = "hand" if state.phase == "paused" and not state.owner else "push"
        for phase in get_args(Phase):
            self._state.labels(phase).set(state.phase == phase)
        self._version.set(state.version)
        self._epoch.set(state.epoch)
        self._workers.set(workers)

    def received(
        self,
        by_rank: Sequence[tuple[int, int]],
        places: Sequence[str],
        by_worker: Sequence[int],
    ) -> None:
        """A push has just committed, of so many bytes from each rank and to each worker."""
        self._committed_at = time.monotonic()
        self._received.inc(sum(by_worker))
        for rank, nbytes in by_rank:
            self._from_rank.labels(str(rank) if rank < _MAX_RANKS else "other").inc(nbytes)
        for place, nbytes in zip(places, by_worker, strict=False):
            self._to_worker.labels(place).inc(nbytes)

    def certificate_ends(self, file: str, at: float) -> None:
        """A TLS file, ``certificate`` or ``client_ca``, was read; ``at``: seconds since 1970."""
        self._certificate_ends.labels(file).set(at)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        self._count_paused()
        self.staleness.set(time.monotonic() - self._committed_at)
        return generate_latest(self.registry)

    def _count_paused(self) -> None:
        """Add what the engine stood still since the last look."""
        now = time.monotonic()
        if self._stopped_by:
            self._paused.labels(self._stopped_by).inc(now - self._looked_at)
        self._looked_at = now
