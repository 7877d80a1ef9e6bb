"""The far end of a ucxx test: registers memory, says where, and lives until its input ends."""

from __future__ import annotations

import sys

import numpy as np

from weightsync.transport import LocalMemory, UcxxTransport

array = np.zeros(int(sys.argv[1]), np.uint8)
with UcxxTransport("peer") as end, end.register([LocalMemory(array.ctypes.data, array.nbytes)]):
    print(array.ctypes.data, end.metadata().hex(), flush=True)
    for _ in sys.stdin:
        print(np.unique(array).tolist(), dict(end.notifications()), flush=True)
