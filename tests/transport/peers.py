"""The far end of a transport, in a process of its own that can be stopped and killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from weightsync.transport import LocalMemory, NixlTransport, UcxxTransport

REPOSITORY = Path(__file__).parents[2]
NBYTES = 32 << 20
KINDS = {"nixl": NixlTransport, "ucxx": UcxxTransport}


def run_python(code: str, **env: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.strip()


class Peer:
    """A process with ``NBYTES`` of registered memory."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = ""
        while len(line.split()) != 2:  # UCX may log to stdout, too
            line = self.process.stdout.readline()
            assert line, "the peer ended"
        addr, metadata = line.split()
        self.addr, self.metadata = int(addr), bytes.fromhex(metadata)

    def look(self) -> str:
        """What the peer's memory and mailbox hold."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


def live(kind: str) -> None:
    """Register memory, say where, and live until the input ends."""
    array = np.zeros(NBYTES, np.uint8)
    with KINDS[kind]("peer") as end, end.register([LocalMemory(array.ctypes.data, NBYTES)]):
        print(array.ctypes.data, end.metadata().hex(), flush=True)
        for _ in sys.stdin:
            print(np.unique(array).tolist(), dict(end.notifications()), flush=True)


if __name__ == "__main__":
    live(sys.argv[1])
