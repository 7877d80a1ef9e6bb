"""What Prometheus gets to see of an agent."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from weightsync.state import AgentState, Phase

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The agent's metrics, in a registry of their own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._state = Gauge(
            "weightsync_state", "1 for the state the agent is in", ["state"], registry=self.registry
        )
        self._version = Gauge(
            "weightsync_version", "Last version that was whole", registry=self.registry
        )
        self._epoch = Gauge("weightsync_epoch", "Last epoch given out", registry=self.registry)
        self._workers = Gauge("weightsync_workers", "Workers attached", registry=self.registry)
        self.pushes = Counter(
            "weightsync_pushes", "Pushes by how they ended", ["outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            "weightsync_phase_seconds",
            "Seconds of each phase of a push",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.errors = Counter(
            "weightsync_errors", "Errors answered or met", ["code"], registry=self.registry
        )
        self.lost = Counter(
            "weightsync_engine_lost", "Times that the engine went away", registry=self.registry
        )

    def show(self, state: AgentState, workers: int) -> None:
        """Set the gauges."""
        for phase in get_args(Phase):
            self._state.labels(phase).set(state.phase == phase)
        self._version.set(state.version)
        self._epoch.set(state.epoch)
        self._workers.set(workers)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
