"""The far end of ucxx writes: what may land here, what is landing, and the messages that came."""

from __future__ import annotations

import bisect
import logging
import secrets
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from weightsync.layout import MemoryKind
from weightsync.transport.base import LocalMemory, Side
from weightsync.transport.ucxx_wire import Ask, Done, Go, Note, Wire, unpack_ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Interval:
    """Registered memory; ``number`` is never used again (WS-8)."""

    number: int
    addr: int
    nbytes: int
    kind: MemoryKind
    device_id: int

    def holds(self, addr: int, nbytes: int, side: Side) -> bool:
        """Whether all of ``nbytes`` bytes at ``addr`` lie in it."""
        mine = (self.kind, self.device_id) == (side.kind, side.device_id)
        return mine and self.addr <= addr and addr + nbytes <= self.addr + self.nbytes


def order(interval: Interval) -> tuple[MemoryKind, int, int]:
    """What :func:`holding` wants intervals sorted by."""
    return interval.kind, interval.device_id, interval.addr


def holding(intervals: Sequence[Interval], addr: int, nbytes: int, side: Side) -> Interval | None:
    """The one of the sorted ``intervals`` that holds all of ``nbytes`` bytes at ``addr``."""
    at = bisect.bisect_right(intervals, (side.kind, side.device_id, addr), key=order) - 1
    return intervals[at] if at >= 0 and intervals[at].holds(addr, nbytes, side) else None


@dataclass
class _Incoming:
    """A write whose receives are posted; the first ``landed`` of them are in place."""

    ask: Ask
    endpoint: Any
    receives: list[Any]
    landed: int = 0


class Target:
    """Takes writes in.  Not thread-safe.

    Attributes:
        key: Who has it may write here; it travels in the metadata.
        intervals: By number.
        inbox: Messages by sender.
    """

    def __init__(self, wire: Wire) -> None:
        self.key = secrets.token_bytes(16)
        self.intervals: dict[int, Interval] = {}
        self.inbox: dict[str, list[bytes]] = {}
        self._wire = wire
        self._numbers = 0
        self._writers: dict[bytes, Any] = {}
        self._incoming: list[_Incoming] = []

    @property
    def busy(self) -> bool:
        """Whether receives are posted."""
        return bool(self._incoming)

    def add(self, memory: Sequence[LocalMemory]) -> list[Interval]:
        """Let writes land there."""
        made = [
            Interval(self._number(), one.addr, one.nbytes, one.kind, one.device_id)
            for one in memory
        ]
        self.intervals.update((each.number, each) for each in made)
        return made

    def take(self, message: Ask | Note) -> None:
        """Post the receives of a write, if all of it may land; nothing moves before.  Or a note."""
        # First of all: what comes without it may be made up, and UCX trusts an address.
        if not secrets.compare_digest(message.key, self.key):
            logger.warning("%s wants to write without this end's key: ignored", message.sender)
            return
        if isinstance(message, Note):
            self.inbox.setdefault(message.sender, []).append(message.body)
            return
        endpoint = self._writers.get(message.address)
        if endpoint is None or not endpoint.alive:
            endpoint = self._writers[message.address] = self._wire.connect(message.address)
        side = Side(message.kind, message.device_id)
        why, places = self._checked(message, side)
        if why:
            self._reply(endpoint, Done(message.write, why))
            return
        stream = self._number()
        receives = [
            self._wire.receive(stream, index, self._wire.memory(addr, nbytes, side))
            for index, (_, addr, nbytes) in enumerate(places)
        ]
        self._incoming.append(_Incoming(message, endpoint, receives))
        self._reply(endpoint, Go(message.write, stream))

    def settle(self) -> bool:
        """Tell the writers of what is over; whether anything was."""
        over = [one for one in self._incoming if self._is_over(one)]
        self._incoming = [one for one in self._incoming if one not in over]
        return bool(over)

    def give_up(self) -> None:
        """Forget what is landing; the wire is cancelled next."""
        self._incoming = []

    def close(self) -> None:
        """Nothing lands from now on."""
        self.intervals.clear()
        for endpoint in self._writers.values():
            self._wire.disconnect(endpoint)
        self._writers.clear()

    def _checked(self, ask: Ask, side: Side) -> tuple[str, list[tuple[int, int, int]]]:
        try:
            places = unpack_ops(ask.ops)
        except struct.error:
            places = []
        if not places:
            return "what it asks for cannot be read", []
        for number, addr, nbytes in places:
            interval = self.intervals.get(number)
            if interval is None or not nbytes or not interval.holds(addr, nbytes, side):
                return f"{nbytes} bytes at {addr:#x} are registered no more", []
        return "", places

    def _is_over(self, one: _Incoming) -> bool:
        try:
            while one.landed < len(one.receives) and one.receives[one.landed].completed:
                one.receives[one.landed].check_error()
                one.landed += 1
        except self._wire.error as error:
            self._reply(one.endpoint, Done(one.ask.write, str(error)))
            return True
        if one.landed < len(one.receives):
            return False
        # every byte is in place: only now is the message seen (WS-2)
        self.inbox.setdefault(one.ask.sender, []).append(one.ask.message)
        self._reply(one.endpoint, Done(one.ask.write))
        return True

    def _reply(self, endpoint: Any, answer: Go | Done) -> None:
        # a writer that is gone needs none
        with suppress(self._wire.error):
            self._wire.say(endpoint, answer)

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
