"""What a publisher is told once, and what it holds open from push to push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weightsync.protocol import PauseMode, PushMode
from weightsync.transport.base import Transport
from weightsync_client.control import Fleet
from weightsync_client.membership import Members
from weightsync_client.policy import Policy
from weightsync_client.progress import Progress
from weightsync_client.ranks import Ranks
from weightsync_client.session import Session
from weightsync_client.settings import Deadlines


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What is the same in every push of a publisher; :class:`Publisher` tells the meanings.

    ``joined``: see :class:`weightsync_client.transaction.Transaction`.
    """

    members: Members
    policy: Policy
    wait_for_agents_s: float
    make_transport: Callable[[], Transport]
    check_finite: bool
    mode: PushMode
    pause_mode: PauseMode
    reset_caches: bool
    deadlines: Deadlines
    ignore: tuple[str, ...]
    max_slot_nbytes: int | None
    coalesce_nbytes: int
    lend_nbytes: int
    progress: Progress
    joined: bool = True


class Open:
    """What a publisher holds open from push to push.

    Attributes:
        fleet: The connections.
        ranks: The ranks that push together.
        session: The last rendezvous, while it may be used.
        last_version: The last version that a begin was sent for: it is not used again (WS-2).
        moved: Names of tensors that were lent and then put elsewhere: from then on they are copied.
        lost: On rank 0, the agents that the last look found lost.
        met: Whether there was a rendezvous: the agents need not be waited for any more.
    """

    def __init__(self, fleet: Fleet, ranks: Ranks) -> None:
        self.fleet = fleet
        self.ranks = ranks
        self.session: Session | None = None
        self.last_version = 0
        self.moved: set[str] = set()
        self.met = False
        self.lost: set[str] = set()

    def used(self, version: int) -> None:
        """A begin is sent for this version."""
        self.last_version = max(self.last_version, version)

    def end_session(self) -> None:
        """Release the session's memory, handles and wire."""
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """End the session and the connections."""
        try:
            self.end_session()
        finally:
            self.ranks.close()
            self.fleet.close()
