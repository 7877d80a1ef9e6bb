"""Nobody who might still write for a push that is over may live when the next one connects."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from weightsync.errors import FencePendingError
from weightsync.process import Writer, may_write_here


def refuse_fenced(writers: Sequence[Writer], place: str) -> None:
    """Look for processes that took part in a push that ended without their word.

    Called by the worker itself: it sees whoever could reach into its memory, since the kernel
    lets nobody in from another namespace of pids.

    Raises:
        FencePendingError: One lives, even if it stands still: a write that it had begun goes on
            when it does, past every deregistration (WS-8).
    """
    alive = [writer.pid for writer in writers if may_write_here(writer)]
    if alive:
        host, pids = socket.gethostname(), ", ".join(map(str, alive))
        raise FencePendingError(
            f"process {pids} on {host} took part in a push that was given up, lives, and might "
            f"still write into {place}",
            hint=f"end it (kill -9 {' '.join(map(str, alive))} on {host}), or let it go on: it "
            "learns that its push is over, and says so",
            pids=alive,
            host=host,
        )
