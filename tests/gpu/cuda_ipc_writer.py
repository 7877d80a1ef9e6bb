"""A writer of a test: posts one write from its device memory, says so, and does nothing more."""

from __future__ import annotations

import sys
import time

import torch

from weightsync.transport import CudaIpcTransport, LocalMemory, NixlTransport, WriteOp
from weightsync.transport.base import Side

addr, nbytes, value, metadata = sys.stdin.readline().split()
memory = torch.full((int(nbytes),), int(value), dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
here = LocalMemory(memory.data_ptr(), memory.numel(), "VRAM", 0)
with CudaIpcTransport(NixlTransport("writer", progress_thread=False)) as end, end.register([here]):
    op = WriteOp(memory.data_ptr(), int(addr), memory.numel())
    peer = end.add_peer(bytes.fromhex(metadata))
    write = end.prepare(peer, [op], local=Side("VRAM", 0), remote=Side("VRAM", 0))
    end.post(write, b"v1")
    print(type(write).__module__, flush=True)
    time.sleep(60)
