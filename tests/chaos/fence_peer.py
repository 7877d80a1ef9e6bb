"""One end of a NIXL write, on a host of its own, that does what it is told line by line.

``worker``: owns the memory.  ``writer``: writes all of it, in pieces, once.  Every line in and out
is a JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from weightsync.errors import WeightSyncError
from weightsync.transport import LocalMemory, NixlTransport, WriteOp

PIECE_NBYTES, PIECES = 1 << 20, 64


def asked() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def worker() -> None:
    array = np.zeros(PIECES * PIECE_NBYTES, np.uint8)
    memory = [LocalMemory(array.ctypes.data, array.nbytes)]
    transport = NixlTransport("worker")
    registration = transport.register(memory)
    say(addr=array.ctypes.data, metadata=transport.metadata().hex())
    peer = ""
    for ask in asked():
        match ask["do"]:
            case "add":
                peer = transport.add_peer(bytes.fromhex(ask["metadata"]))
            case "remove":
                transport.remove_peer(peer)
            case "deregister":
                registration.close()
            case "close":
                transport.close()
            case "open":
                transport = NixlTransport("worker")
                registration = transport.register(memory)
        say(landed=int(np.count_nonzero(array)))


def writer() -> None:
    array = np.ones(PIECES * PIECE_NBYTES, np.uint8)
    with NixlTransport("writer", progress_thread=False) as transport:
        transport.register([LocalMemory(array.ctypes.data, array.nbytes)])
        say(metadata=transport.metadata().hex())
        asks = asked()
        there = next(asks)
        peer = transport.add_peer(bytes.fromhex(there["metadata"]))
        pieces = [
            WriteOp(array.ctypes.data + at, there["addr"] + at, PIECE_NBYTES)
            for at in range(0, array.nbytes, PIECE_NBYTES)
        ]
        write = transport.prepare(peer, pieces)
        say(ready=True)
        next(asks)
        try:
            transport.post(write, b"late")
            transport.wait([write], timeout_s=15)
        except WeightSyncError as error:
            say(outcome=type(error).__name__)
        else:
            say(outcome="done")
        next(asks)


{"worker": worker, "writer": writer}[sys.argv[1]]()
