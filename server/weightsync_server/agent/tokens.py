"""Which bearer tokens are right, and how often an address may send a wrong one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import math
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from weightsync.errors import InputError, TooManyAttemptsError
from weightsync.tokens import read_tokens
from weightsync_server.agent.settings import AgentSettings

log = logging.getLogger(__name__)

Peer = tuple[str, int]

#: characters of a token that is warned of
SHORT = 16
#: seconds between two looks at the token file
LOOK_S = 1.0
#: wrong tokens that an address may send before it has to wait
ALLOWED = 10
#: seconds without a wrong token after which an address starts anew
FORGET_S = 60.0
#: seconds that it waits then: the most that a right token from there is held up
LOCK_S = 5.0
#: addresses, and connections, that are remembered
REMEMBERED = 4096


class Tokens:
    """The tokens that are accepted; those of a file are read again when the file changes.

    Args:
        tokens: What is accepted.
        file: Where they come from.  A file that turns unreadable or malformed changes nothing.
    """

    def __init__(self, tokens: Sequence[str], file: Path | None = None) -> None:
        self._digests = [_digest(token) for token in tokens]
        self._file = file
        self._seen = _signature(file)
        self._look_at = time.monotonic() + LOOK_S

    @classmethod
    def of(cls, settings: AgentSettings) -> Tokens | None:
        """Those that the agent was told; None: it asks for none.

        Raises:
            InputError: See :func:`weightsync.tokens.read_tokens`.
        """
        file, token = settings.token_file, settings.token
        if file is None and token is None:
            return None
        given = [token.get_secret_value()] if token is not None else []
        tokens = given if file is None else read_tokens(file)
        if min(map(len, tokens)) < SHORT:
            log.warning("a token of less than %d characters can be guessed", SHORT)
        if file is not None and file.stat().st_mode & stat.S_IROTH:
            log.warning("every user of this host can read %s: chmod o= %s", file, file)
        return cls(tokens, file)

    def accept(self, given: str) -> bool:
        """Whether this is one of them; the time it takes tells nothing about them."""
        if self._file is not None and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            self._read(self._file)
        digest = _digest(given)
        return any(hmac.compare_digest(digest, right) for right in self._digests)

    def _read(self, file: Path) -> None:
        seen = _signature(file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            tokens = read_tokens(file)
        except InputError as error:
            log.error("the tokens stay as they were: %s", error)
            return
        self._digests = [_digest(token) for token in tokens]
        log.info("the token file was read again: %d accepted", len(tokens))


class FailedAttempts:
    """Slows guessing down, and holds no right token up for long.

    An address that sent ``ALLOWED`` wrong tokens may try again every ``LOCK_S``: meanwhile all its
    calls are refused, unheard.  Connections that brought a right token go on, so that a
    neighbour behind the same address does not stop a push.  Memory is bounded.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: address -> wrong tokens, when the last one came
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._trusted: OrderedDict[Peer, None] = OrderedDict()

    def check(self, peer: Peer | None) -> None:
        """Before the token is looked at.

        Raises:
            TooManyAttemptsError: The address has to wait.
        """
        if peer in self._trusted:
            return
        count, last = self._failed.get(_address(peer), (0, -math.inf))
        left_s = last + LOCK_S - self._clock()
        if count >= ALLOWED and left_s > 0:
            raise TooManyAttemptsError(
                f"too many wrong tokens came from {_address(peer)}",
                hint=f"wait {left_s:.1f} s; check the token of whoever calls from there",
                retry_after_s=round(left_s, 3),
            )

    def failed(self, peer: Peer | None) -> None:
        """A wrong token came."""
        now, address = self._clock(), _address(peer)
        count, last = self._failed.pop(address, (0, now))
        count = count + 1 if now - last < FORGET_S else 1
        self._failed[address] = count, now
        if count == ALLOWED:
            log.warning("%d wrong tokens came from %s: it has to wait now", count, address)
        if len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)
        if peer is not None:
            self._trusted.pop(peer, None)

    def succeeded(self, peer: Peer | None) -> None:
        """A right token came."""
        if peer is not None:
            self._trusted[peer] = None
            self._trusted.move_to_end(peer)
            if len(self._trusted) > REMEMBERED:
                self._trusted.popitem(last=False)


def _digest(token: str) -> bytes:
    # of one length, whatever came: compare_digest does not hide where lengths differ
    return hashlib.sha256(token.encode()).digest()


def _signature(file: Path | None) -> tuple[int, int, int] | None:
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _address(peer: Peer | None) -> str:
    """What counts as one address: of IPv6 a /64, since whoever has one has all of it."""
    if peer is None:
        return "a local socket"
    try:
        address = ipaddress.ip_address(peer[0])
    except ValueError:
        return peer[0]
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return peer[0]
