"""Whatever the demo starts ends with it, children and all, and tells why it ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from weightsync.errors import DeadlineError, EngineError
from weightsync_client.demo.processes import Deadline, Processes, end_all

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
PARENT = """
import signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time\\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nprint('up', flush=True)\\ntime.sleep(60)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def processes(tmp_path):
    with Processes(tmp_path, os.environ) as started:
        yield started


def started_family(processes, *, deaf: bool):
    """A process whose child ignores SIGTERM, and that child's pid."""
    process = processes.start("parent", [sys.executable, "-c", PARENT.format(deaf=deaf)])
    until = time.monotonic() + 20
    while not (text := process.log.read_text()).strip():
        assert time.monotonic() < until
        time.sleep(0.02)
    return process, int(text)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("deaf", [False, True], ids=["polite", "deaf to SIGTERM"])
def test_nothing_of_the_group_outlives_the_end(processes, deaf):
    process, child = started_family(processes, deaf=deaf)
    assert is_running(child)
    end_all([process], grace_s=0.5)
    until = time.monotonic() + 5
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(child)
    assert process.exited


def test_an_error_ends_every_process(tmp_path):
    processes = []

    def interrupted():
        with Processes(tmp_path, os.environ) as started:
            processes.append(started.start("sleeper", SLEEP))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.exited for p in processes] == [True]


def test_a_process_that_ended_tells_with_the_end_of_its_log(processes):
    code = "import sys; [print('line', i) for i in range(100)]; sys.exit('port taken')"
    process = processes.start("first engine", [sys.executable, "-c", code])
    until = time.monotonic() + 20
    while not process.exited:
        assert time.monotonic() < until
        time.sleep(0.02)
    with pytest.raises(EngineError, match="first engine ended unexpectedly") as caught:
        process.check()
    assert "port taken" in caught.value.message
    assert "line 99" in caught.value.message
    assert "line 9\n" not in caught.value.message
    assert "first-engine.log" in caught.value.message


def test_ending_twice_is_harmless(processes):
    process = processes.start("sleeper", SLEEP)
    end_all([process])
    end_all([process])


def test_a_failed_end_is_told(processes):
    process = processes.start("trainer", [sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.raises(EngineError, match="trainer ended with status 7"):
        process.wait(20)


def test_a_deadline_names_what_was_waited_for():
    deadline = Deadline(0.01)
    time.sleep(0.02)
    with pytest.raises(DeadlineError, match="waiting for the first engine"):
        deadline.left_s("the first engine")


def test_a_reserved_port_is_given_to_nobody_else_and_can_be_listened_on(processes):
    port = processes.reserve_port()
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_ctrl_c_while_a_process_starts_leaves_it_to_be_ended(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        made = popen(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        processes.start("sleeper", SLEEP)
    (sleeper,) = processes._started
    end_all([sleeper])
    assert sleeper.popen.returncode is not None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
