"""One ask on its way through its effects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from weightsync.protocol import Message, Span
from weightsync.state_events import Ask
from weightsync.worker_messages import CommitReply, PrepareReply, ReloadReply, RollbackReply
from weightsync_server.agent.engine_client import Answer
from weightsync_server.agent.once import Mark

Timed = TypeVar("Timed", CommitReply, PrepareReply, RollbackReply, ReloadReply)


@dataclass(slots=True)
class Work:
    """One ask on its way through its effects.  ``result`` is what an effect made for the caller."""

    event: Ask
    deadline: float
    request: Message | None = None
    begun: Mark = lambda: None
    extra: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    taken: float = field(default_factory=time.monotonic)

    @property
    def push_id(self) -> str | None:
        """The push that asks, if one does."""
        return getattr(self.event, "push_id", None)

    def left_s(self) -> float:
        """Seconds until its deadline, never none at all."""
        return max(self.deadline - time.monotonic(), 0.001)

    def span(self, name: str, start: float, stop: float, place: str = "") -> None:
        """Something was done for it; moments of the monotonic clock."""
        start_s, seconds = round(start - self.taken, 6), round(stop - start, 6)
        self.spans.append(Span(place=place, name=name, start_s=start_s, seconds=seconds))

    def parts(self, committed: Sequence[Answer[Timed]]) -> dict[str, float]:
        """Spans of what the workers did; the slowest one's seconds by part.

        A worker's clock may be another one than ours, but its parts follow each other, and the
        last one ends when its answer comes.
        """
        for worker in committed:
            start = worker.at - sum(worker.body.seconds.values())
            for name, seconds in worker.body.seconds.items():
                self.span(name, start, start + seconds, worker.place)
                start += seconds
        return max((a.body.seconds for a in committed), key=lambda s: sum(s.values()))
