"""Whose writes of a push that is over could still land, and so must be out of the way first.

A network card refuses a write to memory that was deregistered.  On one host nothing does: the
writer's own kernel copies into the worker's memory for as long as the writer has not given its
handles up (WS-8).  So where a push ends without its writers' word that they have, the next
rendezvous waits for them to give it, to come back themselves, or to end; the workers look.
"""

from __future__ import annotations

from collections.abc import Collection

from weightsync.process import Writer
from weightsync_server.agent.journal import FencedPush


class Fence:
    """Used on the event loop only.

    Attributes:
        writers: The processes that write in the open epoch.
        pushes: Those that are fenced off, by the push that they took part in.
    """

    def __init__(self) -> None:
        self.writers: tuple[Writer, ...] = ()
        self.pushes: dict[str, tuple[Writer, ...]] = {}
        self._written = ""

    def record(self) -> tuple[FencedPush, ...]:
        """The same for the journal."""
        return tuple(FencedPush(push_id=p, writers=w) for p, w in self.pushes.items())

    def recall(self, writers: Collection[Writer], pushes: Collection[FencedPush]) -> None:
        """Go on from the journal."""
        self.writers = tuple(writers)
        self.pushes = {p.push_id: p.writers for p in pushes}

    def others(self, writers: Collection[Writer]) -> list[Writer]:
        """Those that must be gone before ``writers`` may connect.

        A process that makes a new rendezvous has given up what it had of the one before.
        """
        return sorted({w for p in self.pushes.values() for w in p} - {*writers}, key=str)

    def connected(self, writers: Collection[Writer]) -> None:
        """The workers found all others gone, and ``writers`` are those of the open epoch."""
        self.recall(writers, ())

    def ended(self, push_id: str) -> None:
        """A push that had begun is over, and no word came."""
        if self.writers and push_id != self._written:
            self.pushes[push_id] = self.writers
        self.writers = ()

    def released(self, push_id: str, writer: Writer) -> None:
        """A process has nothing of that push on its way any more, and never will."""
        left = tuple(w for w in self.pushes.get(push_id, ()) if w != writer)
        self.pushes.pop(push_id, None)
        if left:
            self.pushes[push_id] = left

    def written(self, push_id: str) -> None:
        """All writes of that push have completed."""
        self._written = push_id
        self.pushes.pop(push_id, None)

    def clear(self) -> None:
        """The workers are other processes: nobody has a way into their memory yet."""
        self.recall((), ())
