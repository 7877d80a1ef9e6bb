"""The errors that every transport gives alike: each function returns one, or raises it itself."""

from __future__ import annotations

from collections.abc import Iterable

from weightsync.errors import (
    DeadlineError,
    PeerLostError,
    TransferFailedError,
    TransportError,
)
from weightsync.layout import MemoryKind

LOST_HINT = "remove_peer, and connect to whatever replaces it under its new name"


def closed_end(name: str) -> TransportError:
    """The transport itself was closed."""
    return TransportError(
        f"transport {name!r} is closed", hint="make a new one; names are never reused"
    )


def unknown_peer(peer: str, name: str) -> TransportError:
    """The transport ``name`` has no such peer."""
    return TransportError(
        f"peer {peer!r} is unknown to {name!r}",
        hint="add_peer with the peer's metadata first",
        peer=peer,
    )


def lost_peer(peer: str) -> PeerLostError:
    """The peer was seen to be gone."""
    return PeerLostError(f"peer {peer!r} is gone", hint=LOST_HINT, peer=peer)


def no_writes(peer: str) -> TransportError:
    """Nothing was given to prepare."""
    return TransportError(
        f"no writes to prepare for {peer!r}", hint="leave out peers without writes", peer=peer
    )


def own_metadata(name: str) -> TransportError:
    """The transport ``name`` was to be its own peer."""
    return TransportError(
        f"transport {name!r} was given its own metadata",
        hint="copy within a process without a transport",
    )


def not_registered(
    where: str, kind: MemoryKind, addr: int, nbytes: int, peer: str
) -> TransportError:
    """A write would touch memory that is not registered, at the end called ``where``."""
    return TransportError(
        f"{nbytes} bytes at {where} {kind} {addr:#x} for {peer!r} do not lie in one registered "
        "interval",
        hint="register first, then exchange metadata, then prepare",
        peer=peer,
    )


def foreign_write(peer: str) -> TransferFailedError:
    """The write was prepared by another transport."""
    return TransferFailedError(
        f"write to {peer!r} was not prepared by this transport",
        hint="post and wait for a write with the transport that prepared it",
        peer=peer,
    )


def check_post(peer: str, notification: bytes, *, closed: bool, posted: bool, failed: bool) -> None:
    """Refuse a write that cannot be posted now, or that says nothing.

    Raises:
        TransferFailedError: It is one.
    """
    if closed or posted or failed:
        state = "closed" if closed else "posted" if posted else "failed"
        raise TransferFailedError(
            f"write to {peer!r} cannot be posted: it is {state}",
            hint="wait for a posted write; prepare a closed or failed one again",
            peer=peer,
        )
    # NIXL takes no message for 'the message of the last post': an older version (WS-2)
    if not notification:
        raise TransferFailedError(
            f"write to {peer!r} has an empty notification",
            hint="name the push in it: the peer learns of the bytes by nothing else",
            peer=peer,
        )


def closed_write(peer: str) -> TransferFailedError:
    """A write that is waited for was closed, so nobody knows what arrived."""
    return TransferFailedError(
        f"write to {peer!r} was closed",
        hint="wait for a write before it, or its peer, is removed",
        peer=peer,
    )


def late(peers: Iterable[str], timeout_s: float) -> DeadlineError:
    """These peers have writes that did not complete in time."""
    names = sorted(set(peers))
    return DeadlineError(
        f"writes to {', '.join(names)} have not completed within {timeout_s} s",
        hint="the peer may be stopped or the wire slow: abort the push",
        peers=names,
    )
