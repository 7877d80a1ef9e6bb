"""Threads that calls to agents wait in, and the end of a process in which some still wait."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import wait

import pytest
from reference import Agent

from weightsync_client.threads import DaemonPool


def test_calls_run_at_once_up_to_the_bound_and_threads_are_used_again() -> None:
    pool = DaemonPool(4, "weightsync-test")
    together = threading.Barrier(4, timeout=10)
    for _ in range(3):
        wait([pool.submit(together.wait) for _ in range(4)], timeout=10)
    many = [pool.submit(lambda i=i: (time.sleep(0.001), i)[1]) for i in range(50)]
    assert [f.result(10) for f in many] == list(range(50))
    names = [t.name for t in threading.enumerate()]
    assert names.count("weightsync-test") == 4
    pool.close()
    deadline = time.monotonic() + 10
    while any(t.name == "weightsync-test" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_of_a_call_is_its_futures() -> None:
    pool = DaemonPool(1, "weightsync-test")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(10)
    assert pool.submit(lambda: 2).result(10) == 2
    pool.close()


def test_ctrl_c_in_a_call_that_hangs_ends_the_process_soon(make_agent) -> None:
    """The deadline of the call that hangs is far off; the process does not wait for it."""
    agents: list[Agent] = [make_agent(), make_agent()]
    over = threading.Event()
    paused = threading.Event()

    def hang() -> None:
        paused.set()
        over.wait(60)

    agents[1].before["/pause"] = hang
    script = textwrap.dedent(
        f"""
        import signal
        import torch
        from weightsync.transport.inmemory import Fabric, InMemoryTransport
        from weightsync_client import Deadlines, Publisher
        from weightsync_client.peers import Peers

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may ignore it
        fabric = Fabric()
        Peers._prepare = lambda *_: None  # the workers are in another process
        publisher = Publisher(
            {[a.url for a in agents]!r}, transport=lambda: InMemoryTransport(fabric),
            deadlines=Deadlines(pause_s=600, abort_s=2, grace_s=0.5), progress="off",
        )
        publisher.push({{"w": torch.ones(3)}})
        """
    )
    for agent in agents:
        for worker in agent.workers:
            worker.connect = lambda *_: None
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert paused.wait(60)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
        assert time.monotonic() - started < 15
    finally:
        over.set()
        process.kill()
        process.communicate(timeout=10)
    assert "KeyboardInterrupt" in told
    assert "phase pause" in told
    assert agents[0].generating
    assert agents[0].state.phase == "ready", "it was told to abort"
