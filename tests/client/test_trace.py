"""The time line of a push: ranks in one order of time, and a file that trace viewers read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from jobs import Job
from reference import Agent

from tests.support.traces import read_trace, seconds
from weightsync.errors import InputError
from weightsync.protocol import Span
from weightsync_client import Publisher
from weightsync_client.report import PHASES, PushReport
from weightsync_client.trace import Recorder, write_trace


def test_phases_of_the_trace_are_those_of_the_report(
    agent: Agent, make_publisher, model: torch.nn.Module, tmp_path: Path
) -> None:
    publisher: Publisher = make_publisher(agent)
    for _ in range(2):
        report = publisher.push(model)
        report.trace(tmp_path / "push.json")
        lanes = read_trace(tmp_path / "push.json")
        phases = lanes["rank 0", "phases"]
        for phase in PHASES:
            assert seconds(phases, phase) == pytest.approx(getattr(report, f"{phase}_s"))
        paused = [s for s in phases if s["name"] in ("pause", "begin", "write", "commit", "resume")]
        assert sum(s["dur"] for s in paused) / 1e6 == pytest.approx(report.paused_s, abs=1e-3)
        calls = [s["name"] for s in lanes[f"agent {agent.url}", "calls"]]
        assert calls == ["begin_update", "commit_update"]
        (write,) = [s for lane, ss in lanes.items() if "write to" in lane[1] for s in ss]
        assert write["args"]["nbytes"] == report.nbytes
    assert "spans" not in report.to_dict()


@pytest.fixture
def reports(fabric, monkeypatch, make_agent) -> list[PushReport]:
    job = Job(fabric, monkeypatch, [make_agent(), make_agent()], 3)
    weights = {name: torch.randn(64, 64) for name in "abc"}
    try:
        # a slow rank: everything after it has to wait for it
        slow = job.publishers[2]
        slow._settings.progress.started = lambda phase, version: (
            time.sleep(0.1) if phase == "fill" else None
        )
        return job.push([weights] * 3)
    finally:
        for publisher in job.publishers:
            publisher.close()


def test_every_rank_is_on_rank_0s_time_line(reports: list[PushReport], tmp_path: Path) -> None:
    report = reports[0]
    report.trace(tmp_path / "push.json")
    lanes = read_trace(tmp_path / "push.json")
    phases = {s["name"]: s for s in lanes["rank 0", "phases"]}

    def within(span, phase) -> bool:
        around, slack = phases[phase], 20_000
        return (
            span["ts"] >= around["ts"] - slack
            and span["ts"] + span["dur"] <= around["ts"] + around["dur"] + slack
        )

    for rank in range(3):
        work = {s["name"]: s for s in lanes[f"rank {rank}", "work"]}
        assert within(work["fill"], "fill")
        assert within(work["write"], "write")
        assert any(key[0] == f"rank {rank}" and "write to" in key[1] for key in lanes)
    begun = {rank: lanes[f"rank {rank}", "work"][0]["ts"] for rank in range(3)}
    assert begun[2] > begun[1] + 80_000, "the rank that came late is seen to"


def test_only_rank_0_has_the_time_line(reports: list[PushReport], tmp_path: Path) -> None:
    assert reports[1] == reports[0]
    with pytest.raises(InputError, match="rank 0"):
        reports[1].trace(tmp_path / "push.json")
    with pytest.raises(InputError, match="cannot write"):
        reports[0].trace(tmp_path / "no" / "folder.json")


def test_what_an_agent_tells_lies_within_its_call_whatever_it_tells(tmp_path: Path) -> None:
    recorder = Recorder()
    sent_at = time.perf_counter()
    time.sleep(0.02)
    told = [
        Span(name="commit", start_s=0.0, seconds=0.01),
        Span(name="digest", start_s=0.002, seconds=0.004, place="w"),
        Span(name="install", start_s=0.006, seconds=0.004, place="w"),
    ]
    recorder.called("http://a", "/commit_update", sent_at, told)
    recorder.called("http://b", "/commit_update", sent_at,
                    [Span(name="commit", start_s=-5.0, seconds=1e6)])  # fmt: skip
    write_trace(tmp_path / "push.json", recorder.timeline([[]]), {})
    lanes = read_trace(tmp_path / "push.json")
    call, commit = lanes["agent http://a", "calls"]
    before, after = commit["ts"] - call["ts"], call["dur"] - commit["dur"]
    assert before == pytest.approx(after / 2, rel=0.01), "in the middle of the call"
    assert [s["name"] for s in lanes["agent http://a", "w"]] == ["digest", "install"]


def test_a_rank_tells_of_its_longest_writes_alone() -> None:
    recorder = Recorder()
    recorder.writes((f"w{i}", 0.0, i / 100, 1) for i in range(1000))
    told = {m.lane for m in recorder.told()}
    assert len(told) == 16
    assert "write to w999" in told
