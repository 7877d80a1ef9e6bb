"""Bulky records on the wire: msgpack, deflated, base64 so that JSON can carry it.

Nothing here evaluates what it reads (WS-10): decoding checks every field against the type.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any, TypeVar

import msgspec

from weightsync.errors import BodyTooLargeError, InputError

T = TypeVar("T")

#: bytes that one packed record may have once inflated
MAX_UNPACKED_NBYTES = 1 << 30


def pack(record: Any, *, deflate: bool = True) -> str:
    """Encode dataclasses, lists, tuples, dicts, str, bytes and numbers as one string.

    ``deflate``: make it short; of no use for digests, which are as random as bytes can be.
    """
    raw = zlib.compress(msgspec.msgpack.encode(record), 1 if deflate else 0)
    return base64.b64encode(raw).decode("ascii")


def unpack(text: str, kind: type[T], *, max_nbytes: int = MAX_UNPACKED_NBYTES) -> T:
    """Decode what :func:`pack` made, checked against ``kind``.

    Raises:
        InputError: Not such a string, or not of that type.
        BodyTooLargeError: It inflates to more than ``max_nbytes`` bytes.
    """
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(text, validate=True), max_nbytes)
        if inflater.unconsumed_tail:
            raise BodyTooLargeError(
                f"packed {kind!r} inflates to more than {max_nbytes} bytes",
                hint="raise the agent's limit, or check what was sent",
            )
        return msgspec.msgpack.decode(raw, type=kind)
    except (binascii.Error, zlib.error, msgspec.DecodeError, ValueError) as error:
        raise InputError(
            f"not a packed {kind!r}: {error}", hint="trainer and agent must have the same version"
        ) from error
