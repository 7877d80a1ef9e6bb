"""Who is on this host: some calls are for nobody else, whatever secret he brings."""

from __future__ import annotations

import ipaddress

from starlette.types import Scope


def is_loopback(host: str) -> bool:
    """Whether an address (or ``localhost``) can be reached from this host only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # ::ffff:127.0.0.1, of a socket for both
    return (address if mapped is None else mapped).is_loopback


def is_from_same_host(scope: Scope) -> bool:
    """Whether a call comes over loopback, or from the very address that it is sent to."""
    peer, server = scope.get("client"), scope.get("server")
    return peer is None or is_loopback(peer[0]) or (server is not None and peer[0] == server[0])
