"""Calls in any order, two trainers at once, bytes that change, clocks that jump."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.chaos.conftest import OPTIONS
from tests.chaos.moments import DEADLINES, settled, strike, what_is_served
from tests.support import stack as support
from tests.support.stack import TOKEN, Daemon, Stack, environ, save

pytestmark = [pytest.mark.nixl, pytest.mark.chaos, pytest.mark.timeout(240)]

PHASES = ("fill", "pause", "begin", "write", "commit", "resume")


class Call(NamedTuple):
    path: str
    body: bytes
    headers: dict[str, str]


@pytest.fixture
def recorded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every POST of this publisher, as it went over the wire."""
    calls: list[Call] = []
    http = stack.publisher._held.fleet._http
    stream = http.stream

    def recording(method: str, url: str, **options: Any) -> Any:
        if method == "POST":
            calls.append(Call(httpx.URL(url).path, options["content"], dict(options["headers"])))
        return stream(method, url, **options)

    monkeypatch.setattr(http, "stream", recording)
    return calls


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calls_of_earlier_pushes_in_any_order_and_at_any_moment_change_nothing(
    stack: Stack, recorded: list[Call], seed: int
) -> None:
    draw = random.Random(seed)
    stack.publisher._held.end_session()  # so that the rendezvous is among the calls
    for _ in range(2):
        stack.push()
    old = list(recorded)
    assert {call.path for call in old} >= {"/init_transfer", "/connect", "/commit_update"}
    # a rendezvous that is made again between two pushes ends the one that stands, as it should
    busy = [call for call in old if call.path not in ("/init_transfer", "/connect")]

    def replay() -> None:
        for call in draw.sample(busy, len(busy)):
            answer = stack._http.post(call.path, content=call.body, headers=call.headers)
            assert answer.status_code < 500, answer.text

    for phase in PHASES:
        stack.progress.hooks[phase] = replay
    weights = stack.weights()
    report = stack.push(weights)
    stack.assert_holds(weights, report.version)
    for call in draw.sample(old, len(old)):
        stack._http.post(call.path, content=call.body, headers=call.headers)
    assert settled(stack) == "ready"
    stack.assert_holds(weights, report.version)
    stack.assert_a_whole_push_works()


# ------------------------------------------------------------------ two trainers


PUSHING = """
import json, sys
from safetensors.torch import load_file
from weightsync.errors import WeightSyncError
from weightsync_client import Publisher

agent, token, weights, pushes = sys.argv[1:]
given = load_file(weights)
with Publisher([agent], token=token, progress="off") as publisher:
    for _ in range(int(pushes)):
        try:
            print(json.dumps(publisher.push(given).version), flush=True)
        except WeightSyncError as error:
            print(json.dumps(error.code), flush=True)
"""


def test_two_trainers_that_push_at_once_never_mix_their_weights(
    stack: Stack, tmp_path: Path
) -> None:
    given = [stack.weights(), stack.weights()]
    trainers = []
    for index, weights in enumerate(given):
        folder = save(weights, stack.checkpoint, tmp_path / str(index))
        command = [sys.executable, "-c", PUSHING, stack.agent.url, TOKEN]
        command += [str(folder / "model.safetensors"), "6"]
        trainers.append(subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE))
    said = []
    for trainer in trainers:
        out, _ = trainer.communicate(timeout=120)
        lines = [line for line in out.decode().splitlines() if line[:1] in '"0123456789']
        said.append([json.loads(line) for line in lines])
    versions = [[v for v in each if isinstance(v, int)] for each in said]
    codes = {c for each in said for c in each if isinstance(c, str)}
    refused = {"push_in_progress", "stale_epoch", "no_session", "stale_version", "illegal_state"}
    refused.add("transfer_failed")  # to an epoch that the other one's rendezvous has ended
    assert codes <= refused, codes
    done = sorted(versions[0] + versions[1])
    assert done, "not one push went through"
    assert len(set(done)) == len(done), "a version was given out twice"
    assert settled(stack) == "ready"
    last = 0 if done[-1] in versions[0] else 1
    stack.assert_holds(given[last], done[-1])
    stack.assert_a_whole_push_works()


# ------------------------------------------------------------------ bytes that change


def flip(stack: Stack) -> None:
    """One bit, in the engine's own memory, behind everybody's back."""
    session = stack.publisher._held.session
    assert session is not None
    regions = session.workers[0].layout.regions
    region = max(regions, key=lambda r: r.nbytes)
    pid = stack.status()["workers"][0]["pid"]
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(region.addr + region.nbytes // 2)
        byte = memory.read(1)[0]
        memory.seek(region.addr + region.nbytes // 2)
        memory.write(bytes([byte ^ 4]))


def test_a_bit_that_flips_in_the_engines_memory_after_the_write_is_found_before_it_serves(
    stack: Stack,
) -> None:
    stack.push()
    struck = strike(stack, "commit", lambda: flip(stack))
    assert struck.how == "VerifyError"
    assert struck.error is not None
    assert "1 of " in str(struck.error)
    stack.assert_torn()
    stack.assert_a_whole_push_works()


# ------------------------------------------------------------------ clocks


CLOCK = """
import os, time
_real = time.time

def _offset():
    with open(os.environ["TEST_CLOCK"]) as offset:
        return float(offset.read() or 0)

time.time = lambda: _real() + _offset()
"""


@pytest.fixture
def jumping(
    checkpoint: Path, engine: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stack, Path]]:
    """An agent whose wall clock can be set."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clock = tmp_path / "clock"
    clock.write_text("0")
    given = environ()
    path = f"{tmp_path}:{given['PYTHONPATH']}"
    monkeypatch.setattr(
        support, "environ", lambda: given | {"PYTHONPATH": path, "TEST_CLOCK": str(clock)}
    )
    stack = Stack(checkpoint, tmp_path, engine, OPTIONS, DEADLINES)
    try:
        stack.heal()
        yield stack, clock
    finally:
        stack.close()


@pytest.mark.parametrize("by_s", [-86_400.0, 86_400.0], ids=["back-a-day", "ahead-a-day"])
@pytest.mark.parametrize("when", ["pause", "write", "commit"])
def test_a_clock_that_jumps_in_a_push_changes_nothing(
    jumping: tuple[Stack, Path], when: str, by_s: float
) -> None:
    stack, clock = jumping
    before = time.time()
    struck = strike(stack, when, lambda: clock.write_text(str(by_s)))
    assert struck.how == "done"
    if when == "pause":
        jumped_s = stack.status()["last_push"]["started_at"] - before
        assert abs(jumped_s - by_s) < 60, "the clock did not jump"
    assert what_is_served(stack, settled(stack), -1) == "new"
    assert struck.report is not None
    stack.assert_holds(struck.weights, struck.report.version)
    stack.assert_a_whole_push_works()
