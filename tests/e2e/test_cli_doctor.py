"""``weightsync doctor`` on this machine, with a real agent and engine."""

from __future__ import annotations

import pytest

from tests.support.cli import Run, invoke
from tests.support.stack import Stack
from tests.support.torch_host import free_port

pytestmark = pytest.mark.nixl
FIELDS = {"id", "severity", "what", "why", "fix", "where"}


def test_both_ends_are_examined_and_a_write_is_measured(stack: Stack, run: Run) -> None:
    done = run("doctor", "--agent", stack.agent.url, "--engine-url", stack.engine.url, "--json")
    assert list(done.json) == ["findings"]
    found = {f["id"]: f for f in done.json["findings"]}
    assert all(f.keys() == FIELDS and f["what"] and f["why"] for f in found.values())
    assert {f["severity"] for f in found.values()} <= {"ok", "warn", "fail"}
    for name in ("reachable", "version", "state", "journal", "workers", "packing", "clock"):
        assert found[f"agent.{name}"]["severity"] == "ok"
        assert found[f"agent.{name}"]["where"] == stack.agent.url
    assert found["engine.middleware"]["severity"] == "ok"
    assert "engine.dev_mode" not in found
    assert "from process to process" in found["probe.write"]["what"]
    assert found["probe.transports"]["what"].startswith("UCX 1.")
    assert {"memlock", "nixl", "gpus", "gpudirect", "capabilities"} <= found.keys()
    assert done.code == int(any(f["severity"] == "fail" for f in found.values()))


def test_what_is_wrong_comes_with_why_and_the_way_out(stack: Stack, run: Run) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    run("pause", stack.agent.url)
    done = run("doctor", "--agent", gone, "--agent", stack.agent.url, "--engine-url",
               stack.agent.url, "--no-probe")  # fmt: skip
    assert done.code == 1
    assert f"✗ agent.reachable ({gone})" in done.out
    assert "start weightsync-agent there" in done.out
    assert f"fix: weightsync resume {stack.agent.url}" in done.out
    assert f"✗ engine.middleware ({stack.agent.url})" in done.out
    without = invoke("doctor", "--agent", stack.agent.url, "--no-probe", "--json",
                     env={"WEIGHTSYNC_TOKEN": "wrong"})  # fmt: skip
    found = {f["id"]: f["severity"] for f in without.json["findings"]}
    assert (found["agent.reachable"], found["agent.token"], without.code) == ("ok", "fail", 1)


def test_bad_arguments_are_told_before_anything_is_measured() -> None:
    done = invoke("doctor", "--agent", "localhost:9100", "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "invalid_input")
