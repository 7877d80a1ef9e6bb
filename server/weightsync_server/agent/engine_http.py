"""HTTP/1.1 to one engine's server, over kept connections: a push's calls are short and many.

A general client costs half a millisecond more a call, all of it while the engine stands still.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

#: an idle connection is dropped before the engine's server drops it under a request
_KEPT_S = 2.0
_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connections:
    """One request at a time on each.  Has no deadlines: cancel a request that takes too long.

    Args:
        base_url: ``http(s)://HOST[:PORT]``; the environment's proxies are not for loopback.
        headers: Sent with every request.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        self._tls = httpx.create_ssl_context(trust_env=False) if parts.scheme == "https" else None
        self._address = parts.hostname or "", parts.port or (80 if self._tls is None else 443)
        fields = {"Host": parts.netloc, "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: deque[tuple[float, _Stream]] = deque()

    async def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer; one that does not tell its length is taken as empty.

        Raises:
            OSError: No connection, or it broke, or what answers speaks no HTTP.
        """
        reader, writer = await self._take()
        try:
            head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            status, fields = _parsed(await reader.readuntil(b"\r\n\r\n"))
            length = fields.get("content-length", "")
            answer = await reader.readexactly(int(length)) if length.isdecimal() else b""
        except (EOFError, ValueError, asyncio.LimitOverrunError) as error:
            writer.close()
            raise ConnectionError(str(error) or "the connection was closed") from error
        except BaseException:
            writer.close()
            raise
        if length.isdecimal() and fields.get("connection", "").lower() != "close":
            self._idle.append((time.monotonic(), (reader, writer)))
        else:
            writer.close()
        return status, answer

    async def _take(self) -> _Stream:
        while self._idle:
            since, (reader, writer) = self._idle.pop()
            if time.monotonic() - since < _KEPT_S and not reader.at_eof():
                return reader, writer
            writer.close()
        host, port = self._address
        return await asyncio.open_connection(host, port, ssl=self._tls)

    def close(self) -> None:
        """End the idle connections."""
        while self._idle:
            self._idle.pop()[1][1].close()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """Status and header fields, by lower-case name.

    Raises:
        ValueError: It is no HTTP/1.1 answer.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1":
        raise ValueError(f"answered {first[:40]!r}, not HTTP/1.1")
    pairs = (line.partition(":") for line in lines if line)
    return int(rest[:3]), {name.strip().lower(): value.strip() for name, _, value in pairs}
