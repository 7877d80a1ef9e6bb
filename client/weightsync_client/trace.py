"""The time line of a push: what every rank, agent and worker did, as a Chrome trace.

Three clocks are brought together without asking any of them for the time of day:

- A rank's spans count from the moment it learned that every engine had begun.  Rank 0 places them
  at the moment it sent that word, so a rank is shown early by at most one message's way.
- An agent's spans count from the moment it took a call.  Rank 0 knows when it sent the call and
  when the answer was there, and places the agent's span in the middle: wrong by at most half of
  what the network and HTTP took.
- A worker's spans end when its answer reached its agent, on the agent's clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsync import protocol
from weightsync.errors import InputError

#: writes that a rank tells of, those that took longest: rank 0 hears of them while engines wait
_WRITES_TOLD = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        process: ``rank 3``, or ``agent http://...``; empty while a rank keeps or tells its own.
        lane: Spans of one lane follow each other or nest.
        name: What was done.
        start_s: Since rank 0 called ``push``, on its clock; what a rank tells counts from its
            anchor.
        seconds: How long it took.
        nbytes: Bytes that it moved; 0: it moved none, or nobody counted.
    """

    process: str
    lane: str
    name: str
    start_s: float
    seconds: float
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """One call to an agent, as rank 0 saw it, and what the agent told of it."""

    url: str
    name: str
    sent_at: float
    answered_at: float
    spans: Sequence[protocol.Span]


class Recorder:
    """What one rank did in one push.  Moments are of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.zero = self.anchor = time.perf_counter()
        self._marks: list[Span] = []
        self._calls: list[_Call] = []

    def add(self, lane: str, name: str, start: float, stop: float, nbytes: int = 0) -> None:
        """Something went on from ``start`` to ``stop``."""
        self._marks.append(Span("", lane, name, start, stop - start, nbytes))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """The body is a span of this rank's work."""
        start = time.perf_counter()
        yield
        self.add("work", name, start, time.perf_counter())

    def writes(self, written: Iterable[tuple[str, float, float, int]]) -> None:
        """Writes to workers: each its place, start, end and bytes."""
        slowest = sorted(written, key=lambda w: w[1] - w[2])[:_WRITES_TOLD]
        for place, start, stop, nbytes in sorted(slowest):
            self.add(f"write to {place}", "write", start, stop, nbytes)

    def called(self, url: str, path: str, sent_at: float, spans: Sequence[protocol.Span]) -> None:
        """An agent has just answered a call; from any thread."""
        name = path.strip("/")
        self._calls.append(_Call(url, name, sent_at, time.perf_counter(), spans))

    def told(self) -> list[Span]:
        """This rank's spans for rank 0; those of rank 0 itself stay here."""
        return [_moved(m, "", -self.anchor) for m in self._marks]

    def timeline(self, ranks: Sequence[Sequence[Span]]) -> tuple[Span, ...]:
        """On rank 0: all spans, by process, lane and start.

        Args:
            ranks: What each rank told, by rank; its own is taken from here, with what came since.
        """
        made = [_moved(m, "rank 0", -self.zero) for m in self._marks]
        for rank, marks in enumerate(ranks[1:], start=1):
            made += [_moved(m, f"rank {rank}", self.anchor - self.zero) for m in marks]
        for call in self._calls:
            made += _placed(call, self.zero)
        return tuple(sorted(made, key=_order))


def _moved(span: Span, process: str, by_s: float) -> Span:
    return Span(process, span.lane, span.name, span.start_s + by_s, span.seconds, span.nbytes)


def _order(span: Span) -> tuple[object, ...]:
    kind, _, which = span.process.partition(" ")
    number = int(which) if kind == "rank" else 0
    # a span comes before those within it
    return kind != "rank", number, span.process, span.lane, span.start_s, -span.seconds


def _placed(call: _Call, zero: float) -> Iterator[Span]:
    """A call, and within it what the agent and its workers did."""
    process = f"agent {call.url}"
    took_s = call.answered_at - call.sent_at
    yield Span(process, "calls", call.name, call.sent_at - zero, took_s)
    agent_s = max((s.start_s + s.seconds for s in call.spans), default=0.0)
    first_s = call.sent_at - zero + max(took_s - agent_s, 0.0) / 2
    for told in call.spans:
        start_s = min(max(told.start_s, 0.0), took_s)
        seconds = min(told.seconds, took_s - start_s)
        yield Span(process, told.place or "calls", told.name, first_s + start_s, seconds)


def check_trace_file(path: Path | None) -> None:
    """Before a push whose time line is wanted.

    Raises:
        InputError: The file's folder is not there.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise InputError(
            f"there is no folder {path.parent} for a trace", hint="make it, or name another file"
        )


def write_trace(path: Path, spans: Sequence[Span], about: dict[str, Any]) -> None:
    """Write spans in the trace event format, for ``chrome://tracing`` and ui.perfetto.dev.

    Args:
        path: The file; it is replaced.
        spans: Of one push, by process and lane.
        about: What the push was.
    """
    events: list[dict[str, Any]] = []
    processes: dict[str, int] = {}
    lanes: dict[tuple[str, str], int] = {}
    for span in spans:
        if (pid := processes.get(span.process)) is None:
            pid = processes[span.process] = len(processes) + 1
            events.append(_name("process_name", pid, 0, span.process))
        if (tid := lanes.get((span.process, span.lane))) is None:
            tid = lanes[span.process, span.lane] = len(lanes) + 1
            events.append(_name("thread_name", pid, tid, span.lane))
        event = {
            "ph": "X", "cat": span.process.split(maxsplit=1)[0], "name": span.name,
            "pid": pid, "tid": tid, "ts": span.start_s * 1e6, "dur": span.seconds * 1e6,
        }  # fmt: skip
        if span.nbytes:
            event["args"] = {"nbytes": span.nbytes}
        events.append(event)
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    path.write_text(json.dumps(trace) + "\n")


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
