"""What the ``cuda_ipc`` transport does itself, with host memory in a GPU's place.

``tests/gpu/test_cuda_ipc_gpu.py`` has the real thing; the conformance suite runs on both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest

from tests.transport.host_cuda import GPU, HostCarrier, HostCuda, HostEnd
from weightsync.errors import DeadlineError, TransportError
from weightsync.transport import CudaIpcTransport, Fabric, LocalMemory, WriteOp, cuda_ipc
from weightsync.transport.base import DRAM
from weightsync.transport.cuda_driver import Allocation

NBYTES = 10_000


@pytest.fixture
def cuda() -> Iterator[HostCuda]:
    cuda = HostCuda()
    with cuda.in_place():
        yield cuda
    assert not cuda.opened


class Pair:
    """A writer and a target, with the bytes of each."""

    def __init__(self, writer: CudaIpcTransport, target: CudaIpcTransport) -> None:
        self.writer, self.target = writer, target
        self.src = np.arange(NBYTES, dtype=np.uint8)
        self.dst = np.zeros(NBYTES, np.uint8)
        for end, array in ((writer, self.src), (target, self.dst)):
            end.register([LocalMemory(array.ctypes.data, NBYTES, "VRAM", 0)])
        self.metadata = target.metadata()
        self.peer = writer.add_peer(self.metadata)

    def prepare(self):
        op = WriteOp(self.src.ctypes.data, self.dst.ctypes.data, NBYTES)
        return self.writer.prepare(self.peer, [op])

    def arrives(self, write) -> bool:
        self.writer.post(write, b"v1")
        self.writer.wait([write], timeout_s=5)
        got = self.target.notifications()
        return got == {self.writer.name: [b"v1"]} and np.array_equal(self.src, self.dst)


@pytest.fixture
def pair(cuda: HostCuda) -> Iterator[Pair]:
    fabric = Fabric()
    with HostEnd(HostCarrier(fabric)) as writer, HostEnd(HostCarrier(fabric)) as target:
        yield Pair(writer, target)


def test_all_bytes_are_copies_and_the_message_is_the_carriers(pair, cuda):
    write = pair.prepare()
    assert isinstance(write, cuda_ipc._Write)
    assert write.copies.sizes == [NBYTES]
    assert cuda.opened == [pair.dst.ctypes.data]
    assert pair.arrives(write)


def test_no_message_leaves_before_the_copies_have_completed(pair, cuda):
    write = pair.prepare()
    cuda.stuck = True
    pair.writer.post(write, b"v1")
    with pytest.raises(DeadlineError, match=pair.peer):
        pair.writer.wait([write], timeout_s=0.05)
    assert not pair.target.notifications()
    assert not pair.dst.any()
    cuda.stuck = False
    pair.writer.wait([write], timeout_s=5)
    assert np.array_equal(pair.src, pair.dst)
    assert pair.target.notifications()


def test_a_write_is_looked_at_rarely_before_it_can_have_ended(pair, cuda):
    write = pair.prepare()
    cuda.takes_s = 0.1
    looks = []
    for _ in range(3):
        before, pair.dst[:] = cuda.looks, 0
        assert pair.arrives(write)
        looks.append(cuda.looks - before)
    assert looks[0] > 100
    assert max(looks[1:]) < looks[0] / 4


def test_a_write_that_is_quicker_than_ever_is_seen_soon(pair, cuda):
    write = pair.prepare()
    cuda.takes_s = 0.2
    assert pair.arrives(write)
    cuda.takes_s = 0.03
    for most_s in (0.15, 0.09):
        started_s, pair.dst[:] = time.monotonic(), 0
        assert pair.arrives(write)
        assert time.monotonic() - started_s < most_s


def test_a_deadline_ends_the_wait_for_a_write_that_took_longer_before(pair, cuda):
    write = pair.prepare()
    cuda.takes_s = 0.1
    assert pair.arrives(write)
    pair.writer.post(write, b"v1")
    started_s = time.monotonic()
    with pytest.raises(DeadlineError, match=pair.peer):
        pair.writer.wait([write], timeout_s=0.01)
    assert time.monotonic() - started_s < 0.08
    pair.writer.wait([write], timeout_s=5)


@pytest.mark.parametrize("end", ["close the write", "remove the peer", "close the end"])
def test_whoever_lets_go_of_a_write_waits_for_its_copies(pair, cuda, end):
    write = pair.prepare()
    pair.writer.post(write, b"v1")  # nobody looks: the copies are still queued
    assert write.stream.queued
    if end == "close the write":
        write.close()
    elif end == "remove the peer":
        pair.writer.remove_peer(pair.peer)
    else:
        pair.writer.close()
    assert not write.stream.queued
    assert np.array_equal(pair.src, pair.dst)


def test_copies_that_never_end_are_waited_for_within_a_bound_and_told(pair, cuda, caplog):
    write = pair.prepare()
    cuda.stuck = True
    pair.writer.post(write, b"v1")
    with patch.object(cuda_ipc, "_CLOSE_S", 0.05):
        write.close()
    assert "have not ended" in caplog.text


def test_memory_of_a_peer_is_mapped_once_and_let_go_with_it(pair, cuda):
    pair.prepare()
    pair.prepare()
    assert cuda.opened == [pair.dst.ctypes.data]
    pair.writer.remove_peer(pair.peer)
    assert not cuda.opened


def test_what_cannot_be_mapped_is_the_carriers(pair, cuda, caplog):
    cuda.unmappable = True
    write = pair.prepare()
    assert not isinstance(write, cuda_ipc._Write)
    assert "CUDA_ERROR_MAP_FAILED" in caplog.text
    assert pair.arrives(write)


def test_the_carrier_hears_of_mapped_memory_only_where_it_has_to_write_there(pair, cuda):
    op = WriteOp(pair.src.ctypes.data, pair.dst.ctypes.data, NBYTES)
    assert pair.arrives(pair.prepare())
    with pytest.raises(TransportError, match="do not lie in one registered interval"):
        pair.writer._carrier.prepare(pair.peer, [op])
    with pair.writer.prepare(pair.peer, [op], local=DRAM) as write:  # as if from the host
        assert not isinstance(write, cuda_ipc._Write)


def test_host_memory_beside_a_gpu_s_is_the_carriers_from_the_start(pair):
    beside = np.zeros(NBYTES, np.uint8)
    pair.target.register([LocalMemory(beside.ctypes.data, NBYTES)])
    assert pair.writer.add_peer(pair.target.metadata()) == pair.peer
    op = WriteOp(pair.src.ctypes.data, beside.ctypes.data, NBYTES)
    write = pair.writer.prepare(pair.peer, [op], remote=DRAM)
    pair.writer.post(write, b"v1")
    pair.writer.wait([write], timeout_s=5)
    assert np.array_equal(pair.src, beside)
    with pytest.raises(TransportError, match="do not lie in one registered interval"):
        pair.writer._carrier.prepare(pair.peer, [WriteOp(op.local_addr, pair.dst.ctypes.data, 1)])


def test_memory_beside_what_is_registered_is_refused_though_it_is_mapped_with_it(pair, cuda):
    array = np.zeros(3 * NBYTES, np.uint8)
    middle = LocalMemory(array.ctypes.data + NBYTES, NBYTES, "VRAM", 0)
    pair.target.register([middle])
    around = Allocation(array.ctypes.data, array.nbytes, b"%d" % array.ctypes.data)
    with patch("weightsync.transport.cuda_driver.export", lambda _: (around,)):
        pair.writer.add_peer(pair.target.metadata([middle]))
    for at in (NBYTES - 1, NBYTES + 1):
        op = WriteOp(pair.src.ctypes.data, array.ctypes.data + at, NBYTES)
        with pytest.raises(TransportError, match="do not lie in one registered interval"):
            pair.writer.prepare(pair.peer, [op])
    op = WriteOp(pair.src.ctypes.data, middle.addr, NBYTES)
    assert isinstance(pair.writer.prepare(pair.peer, [op]), cuda_ipc._Write)


def test_another_host_or_namespace_of_pids_is_the_carriers(pair):
    with patch.object(cuda_ipc, "neighbourhood", lambda: "elsewhere"):
        pair.writer.add_peer(pair.metadata)
        pair.writer.remove_peer(pair.peer)
        pair.peer = pair.writer.add_peer(pair.metadata)
    write = pair.prepare()
    assert not isinstance(write, cuda_ipc._Write)
    assert pair.arrives(write)


@pytest.mark.parametrize("side", ["writer", "target"])
def test_either_end_can_leave_all_to_the_carrier(cuda, side):
    fabric, off = Fabric(), {cuda_ipc.SWITCH: "0"}
    with (
        HostEnd(HostCarrier(fabric), environ=off if side == "writer" else {}) as writer,
        HostEnd(HostCarrier(fabric), environ=off if side == "target" else {}) as target,
    ):
        pair = Pair(writer, target)
        write = pair.prepare()
        assert not isinstance(write, cuda_ipc._Write)
        assert pair.arrives(write)


def test_one_that_is_to_tell_of_no_memory_tells_as_its_carrier_does(cuda):
    array = np.zeros(100, np.uint8)
    carrier = HostCarrier(Fabric())
    with HostEnd(carrier) as end:
        end.register([LocalMemory(array.ctypes.data, 100, GPU.kind, 0)])
        assert end.metadata(()) == carrier.metadata(()) != carrier.metadata()
