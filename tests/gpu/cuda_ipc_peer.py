"""The far end of a test: registers device memory, says where, and lives until its input ends."""

from __future__ import annotations

import sys

import torch

from weightsync.transport import CudaIpcTransport, LocalMemory, NixlTransport

device, nbytes = int(sys.argv[1]), int(sys.argv[2])
memory = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
torch.cuda.synchronize(device)
where = LocalMemory(memory.data_ptr(), nbytes, "VRAM", device)
with CudaIpcTransport(NixlTransport("peer")) as end, end.register([where]):
    print(memory.data_ptr(), end.metadata().hex(), flush=True)
    for _ in sys.stdin:
        print(memory.unique().tolist(), dict(end.notifications()), flush=True)
