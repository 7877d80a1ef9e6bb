"""When certificates end, read out of their PEM file without a library beside Python's own."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

#: days before a certificate's end from which on somebody should have renewed it
RENEW_DAYS = 14

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
#: ASN.1: the version of a certificate, which may be missing, and a time with a year of two digits
_VERSION, _UTC_TIME = 0xA0, 0x17


def ends_at(file: Path) -> float:
    """When the first of a file's certificates ends, in seconds since 1970.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no certificate, or something else that says it is one.
    """
    found = _PEM.findall(file.read_text(encoding="ascii", errors="replace"))
    if not found:
        raise ValueError(f"no certificate in {file}")
    try:
        return min(_not_after(ssl.PEM_cert_to_DER_cert(pem)) for pem in found)
    except IndexError as error:
        raise ValueError(f"a certificate in {file} is cut off") from error


def _not_after(der: bytes) -> float:
    """Of one certificate, laid out as RFC 5280 has it in section 4.1."""
    _, certificate = list(_items(der))[0]  # noqa: RUF015 - IndexError, as for all that is cut off
    _, signed = list(_items(certificate))[0]  # noqa: RUF015
    # serial number, signature, issuer, validity: not before, not after
    fields = [content for tag, content in _items(signed) if tag != _VERSION]
    tag, text = list(_items(fields[3]))[1]
    told = text.decode("ascii")
    if tag == _UTC_TIME:
        told = ("20" if told < "50" else "19") + told
    return datetime.strptime(told, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _items(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element."""
    at = 0
    while at < len(der):
        tag, nbytes = der[at], der[at + 1]
        at += 2
        if nbytes & 0x80:
            sizes = nbytes & 0x7F
            nbytes = int.from_bytes(der[at : at + sizes], "big")
            at += sizes
        yield tag, der[at : at + nbytes]
        at += nbytes
