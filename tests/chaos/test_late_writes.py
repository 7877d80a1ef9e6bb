"""Over TCP, between two hosts: what becomes of a write whose process was given up inside it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.network import Host, Network, network, why_not
from tests.support.stack import environ

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.chaos,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]

NBYTES = 64 << 20
SCRIPT = Path(__file__).with_name("fence_peer.py")


class Peer:
    """A process on a host, spoken to line by line."""

    def __init__(self, role: str, host: Host, log: Path) -> None:
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [*host.exec, sys.executable, str(SCRIPT), role],
                env=environ() | {"UCX_TLS": "tcp,self"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # UCX logs to stdout, too
                return dict(json.loads(line))
        raise AssertionError(f"it ended with {self.process.wait(10)}")

    def tell(self, **what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def ask(self, **what: object) -> dict[str, Any]:
        self.tell(**what)
        return self.read()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    with network(["", "ws-worker", "ws-writer"]) as net:
        net.delay_s = 0.002  # so that a write takes a while
        yield net


@pytest.fixture
def frozen(hosts: Network, tmp_path: Path) -> Iterator[tuple[Peer, Peer]]:
    """Worker and writer; the writer is stopped inside its write."""
    worker = Peer("worker", hosts.hosts[1], tmp_path / "worker.log")
    writer = Peer("writer", hosts.hosts[2], tmp_path / "writer.log")
    try:
        there = worker.read()
        worker.ask(do="add", metadata=writer.read()["metadata"])
        assert writer.ask(**there) == {"ready": True}
        writer.tell(do="write")
        until = time.monotonic() + 30
        while not worker.ask(do="count")["landed"]:
            assert time.monotonic() < until, "nothing landed"
        writer.process.send_signal(signal.SIGSTOP)
        time.sleep(1)  # what is in the air lands
        yield worker, writer
    finally:
        writer.end()
        worker.end()


def landed_late(worker: Peer, writer: Peer, steps: list[str]) -> tuple[int, str]:
    """Bytes that landed after the worker's steps, when the writer went on; what that was told."""
    for step in steps:
        worker.ask(do=step)
    before = worker.ask(do="count")["landed"]
    assert 0 < before < NBYTES
    writer.process.send_signal(signal.SIGCONT)
    outcome = writer.read()["outcome"]
    time.sleep(1)
    return worker.ask(do="count")["landed"] - before, outcome


@pytest.mark.parametrize("steps", [["close"], ["close", "open"]], ids=" ".join)
def test_no_byte_lands_after_the_workers_nixl_agent_has_ended(
    frozen: tuple[Peer, Peer], steps: list[str]
) -> None:
    # ``open``: the same memory is registered again, as by the next epoch
    assert landed_late(*frozen, steps) == (0, "PeerLostError")


@pytest.mark.parametrize(
    "steps", [["remove"], ["deregister"], ["remove", "deregister"]], ids=" ".join
)
def test_removing_the_peer_and_deregistering_keep_nothing_out(
    frozen: tuple[Peer, Peer], steps: list[str]
) -> None:
    # UCX emulates the put in the receiver's process, and does not look for the key there: if this
    # fails, NIXL or UCX has learned to, and docs/failure-model.md has to say so
    late, outcome = landed_late(*frozen, steps)
    assert late > NBYTES // 2
    assert outcome == "done"
