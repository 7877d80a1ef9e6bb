"""Which memory of one process is registered: the checks that every transport makes alike.

NIXL registers a length of zero, an overlap and even an unmapped address without a word, and the
write fails or goes astray much later.  So these are refused here, before a transport sees them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from weightsync.errors import RegistrationError
from weightsync.layout import MemoryKind
from weightsync.transport import refusals
from weightsync.transport.base import LocalMemory, Side

#: no process has addresses above (five-level page tables); UCX hangs on intervals that wrap
_ADDRESS_SPACE_NBYTES = 1 << 57


class RegisteredMemory:
    """The registered intervals of each memory kind and device.  Not thread-safe."""

    def __init__(self) -> None:
        self._intervals: dict[tuple[MemoryKind, int], list[tuple[int, int]]] = {}

    def add(self, memory: Sequence[LocalMemory]) -> None:
        """Take in all of ``memory``, or none of it.

        Raises:
            RegistrationError: Empty, a length of zero, an impossible address, or an overlap.
        """
        if not memory:
            raise RegistrationError(
                "no memory was given to register", hint="register at least one interval"
            )
        done: list[LocalMemory] = []
        try:
            for one in memory:
                self._add(one)
                done.append(one)
        except RegistrationError:
            self.remove(done)
            raise

    def _add(self, one: LocalMemory) -> None:
        start, stop = one.addr, one.addr + one.nbytes
        if one.nbytes <= 0:
            raise RegistrationError(
                f"cannot register {one.nbytes} bytes at {start:#x}: expected one byte or more",
                hint="leave out tensors without elements",
            )
        if start <= 0 or stop > _ADDRESS_SPACE_NBYTES:
            raise RegistrationError(
                f"cannot register {one.nbytes} bytes at {start:#x}: not an address of a process",
                hint="register the data pointer of a tensor that has storage",
            )
        intervals = self._intervals.setdefault((one.kind, one.device_id), [])
        at = bisect.bisect_right(intervals, (start, stop))
        for other in intervals[max(at - 1, 0) : at + 1]:
            if start < other[1] and other[0] < stop:
                raise RegistrationError(
                    f"{one.kind} [{start:#x}, {stop:#x}) overlaps the registered "
                    f"[{other[0]:#x}, {other[1]:#x})",
                    hint="register a storage once and address tensors that share it inside of it",
                )
        intervals.insert(at, (start, stop))

    def remove(self, memory: Sequence[LocalMemory]) -> None:
        """Forget ``memory``, which must have been added before."""
        for one in memory:
            self._intervals[one.kind, one.device_id].remove((one.addr, one.addr + one.nbytes))

    def check(self, where: str, side: Side, peer: str, parts: Iterable[tuple[int, int]]) -> None:
        """Refuse writes that would touch other memory, or none.

        Args:
            where: What this end of the writes is called.
            side: The kind of memory that they mean.
            peer: At their other end, or this one.
            parts: Address and bytes of each.

        Raises:
            TransportError: One does.
        """
        for addr, nbytes in parts:
            if nbytes <= 0 or not self.covers(side.kind, side.device_id, addr, nbytes):
                raise refusals.not_registered(where, side.kind, addr, nbytes, peer)

    def covers(self, kind: MemoryKind, device_id: int, addr: int, nbytes: int) -> bool:
        """Whether one registered interval holds all of ``nbytes`` bytes at ``addr``."""
        intervals = self._intervals.get((kind, device_id), [])
        at = bisect.bisect_right(intervals, (addr, _ADDRESS_SPACE_NBYTES))
        return at > 0 and intervals[at - 1][0] <= addr and addr + nbytes <= intervals[at - 1][1]
