"""What every trace file has to be."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

#: microseconds that a sum of rounded numbers may be off
_SLACK_US = 2.0


def read_trace(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The spans of a trace by process and lane, after a look at its form."""
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    names: dict[tuple[str, int, int], str] = {}
    lanes: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "M":
            names[event["name"], event["pid"], event["tid"]] = event["args"]["name"]
            continue
        assert event["ph"] == "X"
        assert event["ts"] >= -_SLACK_US
        assert event["dur"] >= 0
        process = names["process_name", event["pid"], 0]
        lanes[process, names["thread_name", event["pid"], event["tid"]]].append(event)
    for lane, spans in lanes.items():
        assert_nested(lane, spans)
    return lanes


def assert_nested(lane: tuple[str, str], spans: list[dict[str, Any]]) -> None:
    """Spans of one lane follow each other, or one lies in another."""
    open_until: list[float] = []
    for span in spans:
        while open_until and span["ts"] >= open_until[-1] - _SLACK_US:
            open_until.pop()
        stop = span["ts"] + span["dur"]
        assert not open_until or stop <= open_until[-1] + _SLACK_US, (lane, span)
        open_until.append(stop)


def seconds(spans: list[dict[str, Any]], name: str) -> float:
    """Of all spans of that name."""
    return sum(s["dur"] for s in spans if s["name"] == name) / 1e6
