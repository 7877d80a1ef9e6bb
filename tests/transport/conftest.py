from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from weightsync.transport import (
    Fabric,
    Faults,
    InMemoryTransport,
    LocalMemory,
    NixlTransport,
    Transport,
    UcxxTransport,
)


class Wire:
    """Makes ends of one transport for a test, and closes them after it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fabric = Fabric()
        self.ends: list[Transport] = []
        self.kept: list[np.ndarray] = []

    def end(self) -> Transport:
        if self.kind == "inmemory":
            return self._keep(InMemoryTransport(self.fabric))
        return self._keep(NixlTransport("test") if self.kind == "nixl" else UcxxTransport("test"))

    def stalled_end(self) -> Transport:
        """An end at which no write ever completes."""
        if self.kind == "inmemory":
            end = self.end()
            self.fabric.inject(end.name, Faults(lose_write=True))
            return end
        kind = NixlTransport if self.kind == "nixl" else UcxxTransport
        return self._keep(kind("stalled", progress_thread=False))

    def memory(self, end: Transport, nbytes: int) -> np.ndarray:
        """Registered zeros that live as long as the test."""
        array = np.zeros(nbytes, np.uint8)
        self.kept.append(array)
        end.register([LocalMemory(array.ctypes.data, nbytes)])
        return array

    def _keep(self, end: Transport) -> Transport:
        self.ends.append(end)
        return end

    def receive(self, end: Transport, count: int, timeout_s: float = 10.0) -> dict[str, list]:
        """The first ``count`` notifications of ``end`` by sender."""
        deadline_s = time.monotonic() + timeout_s
        got: dict[str, list[bytes]] = {}
        while sum(map(len, got.values())) < count and time.monotonic() < deadline_s:
            for sender, messages in end.notifications().items():
                got.setdefault(sender, []).extend(messages)
            time.sleep(0.0005)
        return got


@pytest.fixture(
    params=[
        "inmemory",
        pytest.param("nixl", marks=pytest.mark.nixl),
        pytest.param("ucxx", marks=pytest.mark.integrations),
    ]
)
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    wire = Wire(request.param)
    yield wire
    for end in wire.ends:
        end.close()
