"""What a process holds: memory, file descriptors, threads, registrations."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holds:
    """One process at one moment; ``registrations``: None where it has no NIXL."""

    rss_mib: float
    fds: int
    threads: int
    registrations: int | None = None


def holds(pid: int, registrations: int | None = None) -> Holds:
    """What the kernel says of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Holds(
        rss_mib=int(status["VmRSS"].split()[0]) / 1024,
        fds=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(status["Threads"]),
        registrations=registrations,
    )


def open_registrations() -> int:
    """Registrations of all transports of this process that are not closed."""
    from weightsync.transport.nixl import NixlTransport

    return sum(
        len(thing._registrations)
        for thing in gc.get_objects()
        if isinstance(thing, NixlTransport) and thing._agent is not None
    )
