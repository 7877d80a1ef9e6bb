"""A rendezvous belongs to the trainer that opened it.

Session ids are no secret: ``/status`` and ``/events`` tell them.  So the trainer sends a secret of
its own with every call, and what it sent with ``/init_transfer`` is asked of every later call
that names the session: nobody else can hand in NIXL metadata for it, or begin, commit and verify.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict

from weightsync.errors import ForbiddenError
from weightsync.protocol import (
    BeginRequest,
    CommitRequest,
    ConnectRequest,
    InitTransferRequest,
    Message,
    PrepareRequest,
    VerifyRequest,
)

#: sessions that are remembered: more than there are remembered answers
_KEPT = 256


class SessionGuard:
    """Remembers whose the last sessions are.  Used on the event loop only."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, bytes] = OrderedDict()

    def owner(self, session: str | None) -> str:
        """What tells whose a session is, for another agent process; no secret itself."""
        return self._owners.get(session or "", b"").hex()

    def recall(self, session: str, owner: str) -> None:
        """Go on guarding a session that an earlier agent process opened."""
        self._owners[session] = bytes.fromhex(owner)

    def check(
        self, message: Message, secret: str | None, *, open_session: str | None = None
    ) -> None:
        """Refuse a call that is in another trainer's session.

        Args:
            message: Of the call.
            secret: What came with it; None: nothing, which opens a session that asks for nothing.
            open_session: The session that is open now.

        Raises:
            ForbiddenError: The session was opened with another secret, or nobody knows any more.
        """
        if not isinstance(
            message,
            (
                InitTransferRequest,
                ConnectRequest,
                BeginRequest,
                PrepareRequest,
                CommitRequest,
                VerifyRequest,
            ),
        ):
            return
        given = hashlib.sha256((secret or "").encode()).digest()
        owner = self._owners.get(message.session)
        if owner is None:
            # Whoever has the token can open sessions until this one's owner is forgotten here.
            known = message.session != open_session
        else:
            known = hmac.compare_digest(owner, given)
        if not known:
            raise ForbiddenError(
                f"session {message.session} was opened by another trainer",
                hint="make a rendezvous of your own: POST /init_transfer with a new session",
            )
        if isinstance(message, InitTransferRequest):
            self._owners[message.session] = given
            self._owners.move_to_end(message.session)
            if len(self._owners) > _KEPT:
                self._owners.popitem(last=False)
