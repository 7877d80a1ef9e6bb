"""The ucxx transport between device memory of one process."""

from __future__ import annotations

import pytest
import torch

from weightsync.transport import LocalMemory, UcxxTransport, WriteOp
from weightsync.transport.base import Side

pytestmark = pytest.mark.gpu
pytest.importorskip("ucxx")
NBYTES = 64 << 20


@pytest.mark.parametrize("far", [0, 1])
def test_device_bytes_arrive_whole_and_the_message_after_them(far: int) -> None:
    if torch.cuda.device_count() <= far:
        pytest.skip("one GPU")
    src = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda:0")
    dst = torch.zeros(NBYTES, dtype=torch.uint8, device=f"cuda:{far}")
    with UcxxTransport("writer", progress_thread=False) as writer, UcxxTransport() as target:
        writer.register([LocalMemory(src.data_ptr(), NBYTES, "VRAM", 0)])
        target.register([LocalMemory(dst.data_ptr(), NBYTES, "VRAM", far)])
        peer = writer.add_peer(target.metadata())
        op = WriteOp(src.data_ptr(), dst.data_ptr(), NBYTES)
        write = writer.prepare(peer, [op], local=Side("VRAM", 0), remote=Side("VRAM", far))
        for version in (1, 2):
            src.fill_(version)
            torch.cuda.synchronize(0)
            writer.post(write, b"v%d" % version)
            writer.wait([write], timeout_s=20)
            torch.cuda.synchronize(far)
            assert bool((dst == version).all())
            assert target.notifications() == {writer.name: [b"v%d" % version]}
