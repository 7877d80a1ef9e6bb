"""A process is told from others for all time, and its end is seen."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from weightsync.codec import pack, unpack
from weightsync.errors import FencePendingError
from weightsync.process import Writer, may_write_here, this_process
from weightsync_server.receiver.fence import refuse_fenced

SAY_WHO = """
from dataclasses import astuple
from weightsync.process import this_process
print(*astuple(this_process()), flush=True)
input()
"""


@pytest.fixture
def other():
    """Another process, and who it says that it is."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SAY_WHO], stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        host, *numbers = process.stdout.readline().split()
        yield process, Writer(host, *map(int, numbers))
        process.kill()


def test_a_process_that_runs_or_stands_still_may_write_and_a_dead_one_may_not(other):
    process, writer = other
    assert may_write_here(writer)
    with pytest.raises(FencePendingError) as refused:
        refuse_fenced([writer, replace(writer, started=1)], "engine0/dp0/pp0/tp0/ep0")
    assert refused.value.context["pids"] == [process.pid]
    assert f"kill -9 {process.pid} on " in refused.value.hint
    process.send_signal(signal.SIGSTOP)
    assert may_write_here(writer)
    process.kill()
    deadline = time.monotonic() + 5
    while may_write_here(writer):  # before its parent has looked: a zombie has no memory
        assert time.monotonic() < deadline
    refuse_fenced([writer], "engine0/dp0/pp0/tp0/ep0")


def test_other_hosts_namespaces_and_later_processes_are_told_apart():
    me = this_process()
    assert me is not None
    assert may_write_here(me)
    assert not may_write_here(replace(me, host="another"))
    assert not may_write_here(replace(me, pid_namespace=me.pid_namespace + 1))
    assert not may_write_here(replace(me, started=me.started + 1)), "the same pid, later"
    assert not may_write_here(replace(me, pid=2**40))
    assert not may_write_here(replace(me, pid=-1))


def test_a_writer_travels():
    me = this_process()
    assert unpack(pack([me]), list[Writer]) == [me]
