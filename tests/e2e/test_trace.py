"""The time line of a push into a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.stack import Stack
from tests.support.traces import read_trace, seconds


def test_a_trace_shows_what_the_agent_and_its_workers_did(stack: Stack, tmp_path: Path) -> None:
    report = stack.push()
    report.trace(tmp_path / "push.json")
    lanes = read_trace(tmp_path / "push.json")
    agent = f"agent {stack.agent.url}"
    calls = lanes[agent, "calls"]
    assert [s["name"] for s in calls] == [
        "pause", "pause", "begin_update", "begin", "commit_update", "commit",
        "resume", "resume",
    ]  # fmt: skip
    worker = lanes[agent, "engine0/dp0/pp0/tp0/ep0"]
    assert [s["name"] for s in worker] == ["begin", "writers", "digest", "install", "refresh"]
    told = report.agents[0].seconds
    for part in ("writers", "digest", "install", "refresh"):
        assert seconds(worker, part) == pytest.approx(told[part], abs=1e-5)
    by_name = {s["name"]: s for s in calls}
    commit, refresh = by_name["commit_update"], worker[-1]
    assert commit["ts"] <= worker[1]["ts"]
    assert refresh["ts"] + refresh["dur"] <= commit["ts"] + commit["dur"]
    assert commit["dur"] / 1e6 == pytest.approx(report.commit_s, rel=0.5, abs=0.05)


def test_a_trace_of_shadow_mode_shows_the_pause_after_the_writes(
    stack: Stack, tmp_path: Path
) -> None:
    with stack.new_publisher(mode="shadow") as publisher:
        publisher.push(stack.weights())
        report = publisher.push(stack.weights())
    report.trace(tmp_path / "push.json")
    lanes = read_trace(tmp_path / "push.json")
    phases = [s["name"] for s in lanes["rank 0", "phases"]]
    assert phases == ["fill", "begin", "write", "prepare", "pause", "commit", "resume"]
    agent = f"agent {stack.agent.url}"
    calls = {s["name"]: s for s in lanes[agent, "calls"]}
    assert calls["prepare_commit"]["ts"] < calls["pause"]["ts"] < calls["commit"]["ts"]
    names = [s["name"] for s in lanes[agent, "engine0/dp0/pp0/tp0/ep0"]]
    assert names[0] == "begin"
    checked = next(s for s in lanes[agent, "engine0/dp0/pp0/tp0/ep0"] if s["name"] == "digest")
    assert checked["ts"] < calls["pause"]["ts"], "bytes are checked while the engine serves"
