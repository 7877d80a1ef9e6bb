"""The reference transport goes wrong on demand, and only then."""

from __future__ import annotations

import time

import numpy as np
import pytest

from weightsync.errors import (
    DeadlineError,
    PeerLostError,
    RegistrationError,
    TransferFailedError,
    TransportError,
)
from weightsync.transport import Fabric, Faults, InMemoryTransport, LocalMemory, WriteOp


class Pair:
    """A writer and a target with 1,000 bytes each; the write is two halves."""

    def __init__(self) -> None:
        self.fabric = Fabric()
        self.writer = InMemoryTransport(self.fabric)
        self.target = InMemoryTransport(self.fabric)
        self.src = np.full(1000, 7, np.uint8)
        self.dst = np.zeros(1000, np.uint8)
        self.writer.register([LocalMemory(self.src.ctypes.data, 1000)])
        self.target.register([LocalMemory(self.dst.ctypes.data, 1000)])
        self.peer = self.writer.add_peer(self.target.metadata())
        self.write = self.writer.prepare(
            self.peer,
            [WriteOp(self.src.ctypes.data + at, self.dst.ctypes.data + at, 500) for at in (0, 500)],
        )

    def inject(self, faults: Faults) -> None:
        self.fabric.inject(self.peer, faults)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_delayed_write_lands_late_and_notifies_after_its_bytes(pair):
    pair.inject(Faults(delay_s=0.1))
    start_s = time.monotonic()
    pair.writer.post(pair.write, b"v1")
    assert not pair.target.notifications()
    assert not pair.dst.any()
    pair.writer.wait([pair.write], timeout_s=5)
    assert time.monotonic() - start_s >= 0.1
    assert (pair.dst == 7).all()
    assert pair.target.notifications() == {pair.writer.name: [b"v1"]}


def test_the_target_sees_a_delayed_write_without_the_writer_waiting(pair):
    pair.inject(Faults(delay_s=0.05))
    pair.writer.post(pair.write, b"v1")
    time.sleep(0.06)
    assert pair.target.notifications() == {pair.writer.name: [b"v1"]}
    assert (pair.dst == 7).all()
    pair.writer.wait([pair.write], timeout_s=0)


def test_a_lost_write_runs_into_the_deadline(pair):
    pair.inject(Faults(lose_write=True))
    pair.writer.post(pair.write, b"v1")
    with pytest.raises(DeadlineError, match=pair.peer):
        pair.writer.wait([pair.write], timeout_s=0.05)
    assert not pair.dst.any()
    assert not pair.target.notifications()


def test_a_lost_notification_leaves_the_bytes_and_completes(pair):
    pair.inject(Faults(lose_notification=True))
    pair.writer.post(pair.write, b"v1")
    pair.writer.wait([pair.write], timeout_s=1)
    assert (pair.dst == 7).all()
    assert not pair.target.notifications()


def test_a_torn_write_completes_with_part_of_its_bytes(pair):
    pair.inject(Faults(torn_nbytes=600))
    pair.writer.post(pair.write, b"v1")
    pair.writer.wait([pair.write], timeout_s=1)
    assert (pair.dst[:600] == 7).all()
    assert not pair.dst[600:].any()
    assert pair.target.notifications() == {pair.writer.name: [b"v1"]}


def test_a_peer_that_dies_in_mid_write_leaves_a_tear_and_an_error(pair):
    pair.inject(Faults(torn_nbytes=600, dead=True))
    pair.writer.post(pair.write, b"v1")
    for _ in range(2):
        with pytest.raises(PeerLostError, match=pair.peer):
            pair.writer.wait([pair.write], timeout_s=1)
    assert (pair.dst[:600] == 7).all()
    assert not pair.dst[600:].any()
    with pytest.raises(TransferFailedError, match="failed"):
        pair.writer.post(pair.write, b"v2")


def test_a_dead_peer_is_lost_to_every_call(pair):
    pair.inject(Faults(dead=True))
    ops = [WriteOp(pair.src.ctypes.data, pair.dst.ctypes.data, 10)]
    for call in (
        lambda: pair.writer.post(pair.write, b"v1"),
        lambda: pair.writer.prepare(pair.peer, ops),
        lambda: pair.writer.notify(pair.peer, b"hello"),
    ):
        with pytest.raises(PeerLostError, match=pair.peer):
            call()
    assert not pair.dst.any()


def test_a_peer_that_dies_before_a_delayed_write_lands_gets_no_byte(pair):
    pair.inject(Faults(delay_s=0.02))
    pair.writer.post(pair.write, b"v1")
    pair.target.close()
    with pytest.raises(PeerLostError):
        pair.writer.wait([pair.write], timeout_s=1)
    assert not pair.dst.any()


def test_faults_end_when_they_are_taken_back(pair):
    pair.inject(Faults(lose_notification=True))
    pair.inject(Faults())
    pair.writer.post(pair.write, b"v1")
    assert pair.target.notifications() == {pair.writer.name: [b"v1"]}


def test_another_fabric_is_out_of_reach(pair):
    stranger = InMemoryTransport(Fabric())
    with pytest.raises(TransportError, match="fabric"):
        pair.writer.add_peer(stranger.metadata())


def test_device_memory_is_refused(pair):
    with pytest.raises(RegistrationError, match="VRAM"):
        pair.writer.register([LocalMemory(4096, 10, "VRAM")])
