"""What is the ucxx transport's own: its fences, its loading, and a peer in another process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.transport.peers import NBYTES, Peer, run_python
from weightsync.errors import DeadlineError, InputError, PeerLostError, TransferFailedError
from weightsync.transport import LocalMemory, UcxxTransport, WriteOp
from weightsync_server.receiver.endpoint import named_transport

MIB = 1 << 20
with_ucxx = pytest.mark.integrations


def test_without_ucxx_the_constructor_says_what_to_install():
    code = """
import sys
sys.modules["ucxx"] = None
from weightsync.errors import TransportError
from weightsync.transport import UcxxTransport
try:
    UcxxTransport()
except TransportError as error:
    print(error.message, "|", error.hint)
"""
    said = run_python(code)
    assert "ucxx cannot be loaded" in said
    assert 'pip install "weightsync[ucxx]"' in said


def test_an_engine_refuses_a_transport_that_does_not_exist():
    with pytest.raises(InputError, match="'carrier-pigeon'"):
        named_transport(environ={"WEIGHTSYNC_TRANSPORT": "carrier-pigeon"})


class Ends:
    """A writer and a target in this process."""

    def __init__(self) -> None:
        self.writer, self.target = UcxxTransport("writer", progress_thread=False), UcxxTransport()
        self.src, self.dst = np.full(MIB, 7, np.uint8), np.zeros(MIB, np.uint8)
        self.writer.register([LocalMemory(self.src.ctypes.data, MIB)])
        self.registration = self.target.register([LocalMemory(self.dst.ctypes.data, MIB)])
        self.op = WriteOp(self.src.ctypes.data, self.dst.ctypes.data, MIB)

    def push(self, message: bytes = b"v1") -> None:
        peer = self.writer.add_peer(self.target.metadata())
        write = self.writer.prepare(peer, [self.op])
        self.writer.post(write, message)
        self.writer.wait([write], timeout_s=10)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.writer.close()
    ends.target.close()


@with_ucxx
def test_nothing_lands_in_memory_that_is_registered_no_more_not_even_at_its_old_address(ends):
    peer = ends.writer.add_peer(ends.target.metadata())
    write = ends.writer.prepare(peer, [ends.op])
    ends.registration.close()
    again = ends.target.register([LocalMemory(ends.dst.ctypes.data, MIB)])
    ends.writer.post(write, b"v1")
    with pytest.raises(TransferFailedError, match="registered no more"):
        ends.writer.wait([write], timeout_s=10)
    with pytest.raises(TransferFailedError, match="failed"):
        ends.writer.post(write, b"v2")
    assert not ends.dst.any()
    assert not ends.target.notifications()
    ends.push(b"v3")
    assert (ends.dst == 7).all()
    again.close()


@with_ucxx
def test_who_lacks_the_targets_key_writes_nothing_and_is_not_heard(ends):
    peer = ends.writer.add_peer(ends.target.metadata())
    write = ends.writer.prepare(peer, [ends.op])
    ends.target._target.key = b"another key of 16"[:16]
    ends.writer.notify(peer, b"hello")
    ends.writer.post(write, b"v1")
    with pytest.raises(DeadlineError):
        ends.writer.wait([write], timeout_s=0.3)
    assert not ends.dst.any()
    assert not ends.target.notifications()


@with_ucxx
def test_memory_that_goes_while_a_write_is_landing_ends_the_write(ends):
    peer = ends.writer.add_peer(ends.target.metadata())
    write = ends.writer.prepare(peer, [ends.op])
    ends.writer.post(write, b"v1")
    deadline = time.monotonic() + 10
    while not ends.target._target.busy:  # receives are posted; the writer has not looked since
        ends.writer._wire._worker.progress_once()
        assert time.monotonic() < deadline
    ends.registration.close()
    with pytest.raises((TransferFailedError, DeadlineError)):
        ends.writer.wait([write], timeout_s=0.5)
    assert not ends.target.notifications()


@with_ucxx
def test_an_idle_target_sleeps(ends):
    ends.push()
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.3


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer("ucxx")
    yield peer
    peer.close()


@pytest.fixture
def link(peer):
    """A writer, and its prepared write to the peer, which has worked once."""
    source = np.full(NBYTES, 7, np.uint8)
    with UcxxTransport("writer", progress_thread=False) as writer:
        writer.register([LocalMemory(source.ctypes.data, NBYTES)])
        name = writer.add_peer(peer.metadata)
        write = writer.prepare(name, [WriteOp(source.ctypes.data, peer.addr, NBYTES)])
        writer.post(write, b"v1")
        writer.wait([write], timeout_s=20)
        yield writer, write


@with_ucxx
def test_bytes_and_message_reach_another_process(peer, link):
    writer, _ = link
    assert peer.look() == f"[7] { ({writer.name: [b'v1']}) }\n"


@with_ucxx
def test_a_killed_peer_is_lost_or_late_and_never_done(peer, link):
    writer, write = link
    peer.kill()

    def push() -> None:
        writer.post(write, b"v2")
        writer.wait([write], timeout_s=5)

    with pytest.raises((PeerLostError, DeadlineError)):
        push()


@with_ucxx
def test_a_stopped_peer_is_late_and_the_write_completes_when_it_goes_on(peer, link):
    writer, write = link
    peer.process.send_signal(signal.SIGSTOP)
    writer.post(write, b"v2")
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="peer-"):
        writer.wait([write], timeout_s=0.5)
    assert time.monotonic() - started < 5
    peer.process.send_signal(signal.SIGCONT)
    writer.wait([write], timeout_s=20)
    assert "v2" in peer.look()
