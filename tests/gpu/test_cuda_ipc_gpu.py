"""Copies into mapped memory of another process, on the same GPU and on another one.

With ``-s`` the rates of both wires are printed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from weightsync.errors import DeadlineError, TransportError
from weightsync.transport import CudaIpcTransport, LocalMemory, NixlTransport, WriteOp, cuda_ipc
from weightsync.transport.base import PreparedWrite, Side

pytestmark = [pytest.mark.gpu, pytest.mark.nixl]
NBYTES = 1 << 30
HERE = Side("VRAM", 0)
PEER = Path(__file__).with_name("cuda_ipc_peer.py")


class Peer:
    """A process with a GiB on a device."""

    def __init__(self, device: int) -> None:
        self.side = Side("VRAM", device)
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), str(device), str(NBYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        addr, metadata = self.process.stdout.readline().split()
        self.addr, self.metadata = int(addr), bytes.fromhex(metadata)

    def says(self) -> str:
        print(file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.fixture(params=[0, 1], ids=["the same GPU", "another GPU"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if torch.cuda.device_count() <= request.param:
        pytest.skip("one GPU")
    peer = Peer(request.param)
    yield peer
    peer.process.kill()
    peer.process.communicate()


@pytest.fixture
def src() -> torch.Tensor:
    return torch.zeros(NBYTES, dtype=torch.uint8, device="cuda:0")


@pytest.fixture
def writer(src: torch.Tensor) -> Iterator[CudaIpcTransport]:
    with CudaIpcTransport(NixlTransport("writer", progress_thread=False)) as end:
        end.register([LocalMemory(src.data_ptr(), NBYTES, "VRAM", 0)])
        yield end


def ops_of(peer: Peer, src: torch.Tensor, pieces: int) -> list[WriteOp]:
    step = NBYTES // pieces
    return [WriteOp(src.data_ptr() + at, peer.addr + at, step) for at in range(0, NBYTES, step)]


def prepared(
    writer: CudaIpcTransport, peer: Peer, src: torch.Tensor, pieces: int = 4
) -> PreparedWrite:
    ops = ops_of(peer, src, pieces)
    return writer.prepare(writer.add_peer(peer.metadata), ops, local=HERE, remote=peer.side)


def test_another_process_has_all_bytes_when_it_has_the_message(writer, peer, src):
    write = prepared(writer, peer, src)
    assert isinstance(write, cuda_ipc._Write)
    for version in (1, 2, 3):
        src.fill_(version)
        torch.cuda.synchronize()
        writer.post(write, b"v%d" % version)
        writer.wait([write], timeout_s=20)
        assert peer.says() == f"[{version}] {{'{writer.name}': [b'v{version}']}}"


def test_where_the_switch_is_off_the_carrier_writes(peer, src):
    carrier = NixlTransport("writer", progress_thread=False)
    with CudaIpcTransport(carrier, environ={cuda_ipc.SWITCH: "0"}) as writer:
        writer.register([LocalMemory(src.data_ptr(), NBYTES, "VRAM", 0)])
        write = prepared(writer, peer, src)
        assert not isinstance(write, cuda_ipc._Write)
        src.fill_(7)
        torch.cuda.synchronize()
        writer.post(write, b"v1")
        writer.wait([write], timeout_s=20)
        assert peer.says() == f"[7] {{'{writer.name}': [b'v1']}}"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_peer_that_is_gone_is_noticed_and_cuda_goes_on(writer, peer, src, sent):
    write = prepared(writer, peer, src)
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=20)
    os.kill(peer.process.pid, sent)
    if sent == signal.SIGKILL:
        peer.process.wait(10)
    writer.post(write, b"v2")
    with pytest.raises((TransportError, DeadlineError), match=write.peer):
        writer.wait([write], timeout_s=3)
    write.close()
    writer.remove_peer(write.peer)
    src.fill_(5)
    assert bool((src == 5).all())


def test_memory_of_a_dead_peer_is_free_again_once_the_writer_lets_go(writer, peer, src):
    """Whether it is before, is printed: an engine that starts again would miss it."""

    def free() -> int:
        return torch.cuda.mem_get_info(peer.side.device_id)[0]

    write = prepared(writer, peer, src)
    writer.post(write, b"v1")
    writer.wait([write], timeout_s=20)
    before = free()
    peer.process.kill()
    peer.process.wait(10)
    time.sleep(1)
    print(f"freed by its end: {(free() - before) >> 20} MiB of {NBYTES >> 20}")
    writer.remove_peer(write.peer)
    time.sleep(1)
    assert free() - before >= NBYTES


def test_copies_of_a_writer_that_is_stopped_land_and_their_message_does_not_come():
    """Why the fence waits for writers of the host: docs/failure-model.md says what this shows."""
    dst = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    with CudaIpcTransport(NixlTransport("target")) as target:
        target.register([LocalMemory(dst.data_ptr(), NBYTES, "VRAM", 0)])
        process = subprocess.Popen(
            [sys.executable, str(PEER.with_name("cuda_ipc_writer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            print(
                dst.data_ptr(), NBYTES, 9, target.metadata().hex(), file=process.stdin, flush=True
            )
            assert process.stdout.readline().strip() == cuda_ipc.__name__
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            assert bool((dst == 9).all())
            assert not target.notifications()
        finally:
            process.kill()
            process.communicate()
