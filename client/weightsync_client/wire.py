"""HTTP/1.1 over connections that stay open, with little of Python between a call and its bytes.

A push makes a handful of calls, on the thread that pushes, and engines stand still for most of
them: a request is one send, and of an answer's headers only those are read that say where it ends.
``http.client`` takes half as long again for one, httpx several times as long.  What fails is told
as httpx would tell it.
"""

from __future__ import annotations

import io
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from weightsync_client.bearer import Bearer

_CHUNK_NBYTES = 1 << 16
#: of a status line, a header, the size of a chunk
_LINE_NBYTES = 1 << 16
_MOST_HEADERS = 100
#: a connection that lay idle for longer may be gone at the far end, or on the way
_KEPT_S = 60.0

_Key = tuple[str, str, str | None]


class Answer:
    """A response whose body is read as it comes; the names are those of ``httpx.Response``.

    ``headers`` have lower-case names; of several of one name it is the last.

    Raises:
        httpx.TransportError: What comes is no answer, or none comes.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.extensions: dict[str, Any] = {"network_stream": self}
        #: nothing of it is left on the connection, which may be used again
        self.whole = False
        self._tls = connection if isinstance(connection, ssl.SSLSocket) else None
        self._stream: io.BufferedReader = connection.makefile("rb")
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def _read_head(self) -> None:
        self.status_code = 0
        while self.status_code < 200:  # before the answer there may be others, of 1xx
            version, _, rest = self._line().partition(b" ")
            if version not in {b"HTTP/1.1", b"HTTP/1.0"} or not rest[:3].isdigit():
                raise httpx.RemoteProtocolError(f"no HTTP/1.1: {version[:80]!r}")
            self.status_code = int(rest[:3])
            self.headers: dict[str, str] = {}
            for line in self._lines():
                name, _, value = line.partition(b":")
                self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        said = self.headers.get("connection", "").lower()
        self._stays = version == b"HTTP/1.1" and "close" not in said

    def _lines(self) -> Iterator[bytes]:
        """Up to an empty one."""
        for _ in range(_MOST_HEADERS + 1):
            if not (line := self._line()):
                return
            yield line
        raise httpx.RemoteProtocolError(f"more than {_MOST_HEADERS} headers")

    def _line(self) -> bytes:
        """Without its end."""
        line = self._stream.readline(_LINE_NBYTES)
        if not line.endswith(b"\n"):
            what = "a line has no end" if len(line) == _LINE_NBYTES else "the connection ended"
            raise httpx.RemoteProtocolError(what)
        return line.rstrip(b"\r\n")

    def get_extra_info(self, name: str) -> ssl.SSLSocket | None:
        """The socket, as ``ssl_object`` of a connection with TLS."""
        return self._tls if name == "ssl_object" else None

    def iter_bytes(self) -> Iterator[bytes]:
        """The body in parts, each as soon as it is there.

        Raises:
            httpx.TransportError: The connection ended before it did, or nothing came for too long.
        """
        length = self.headers.get("content-length")
        with _as_httpx():
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while nbytes := _number(self._line().partition(b";")[0], 16):
                    yield from self._part(nbytes)
                    if self._line():
                        raise httpx.RemoteProtocolError("a chunk is longer than it says")
                for _ in self._lines():  # trailers
                    pass
            elif length is not None:
                yield from self._part(_number(length.encode("latin-1"), 10))
            elif self.status_code not in {204, 304}:
                self._stays = False
                while chunk := self._stream.read1(_CHUNK_NBYTES):
                    yield chunk
        self.whole = self._stays

    def _part(self, nbytes: int) -> Iterator[bytes]:
        while nbytes:
            chunk = self._stream.read1(min(nbytes, _CHUNK_NBYTES))
            if not chunk:
                raise httpx.RemoteProtocolError(f"the connection ended {nbytes} bytes too early")
            nbytes -= len(chunk)
            yield chunk

    def close(self) -> None:
        """Let go of the connection; it stays open for who has it.  Safe to call twice."""
        self._stream.close()


class Connections:
    """Connections to any number of servers, as many at a time as there are calls.

    Args:
        headers: Of every request.
        bearer: Gives the token of every request; None: none is sent.
        verify: TLS context; True: the authorities that httpx trusts.
    """

    def __init__(
        self, headers: Mapping[str, str], bearer: Bearer | None, verify: ssl.SSLContext | bool
    ) -> None:
        self._headers = dict(headers)
        self._bearer = bearer
        self._verify = verify
        self._lock = threading.Lock()
        self._idle: dict[_Key, list[tuple[float, socket.socket]]] = {}
        self._closed = False

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: httpx.Timeout,
        extensions: Mapping[str, Any],
    ) -> Iterator[Answer]:
        """One request; the arguments are those of ``httpx.Client.stream``.

        A KeyboardInterrupt, or a body that is not read to its end, ends the connection.

        Raises:
            httpx.TransportError: No connection, or it broke.
        """
        parts = urlsplit(url)
        key = parts.scheme, parts.netloc, extensions.get("sni_hostname")
        request = self._request(method, parts, content, headers or {})
        connection = self._kept(key) or self._open(parts, key[2], timeout.connect)
        answer = None
        try:
            connection.settimeout(timeout.read)
            with _as_httpx():
                # who hangs up on a request may have answered it before
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(request)
                answer = Answer(connection)
            yield answer
        finally:
            if answer is not None:
                answer.close()
            if answer is None or not answer.whole or not self._keep(key, connection):
                connection.close()

    def _request(
        self, method: str, parts: SplitResult, content: bytes | None, headers: Mapping[str, str]
    ) -> bytes:
        told = {
            "Host": parts.netloc.rpartition("@")[2],
            "Accept-Encoding": "identity",
            **self._headers,
            **headers,
        }
        if self._bearer is not None:
            told["Authorization"] = self._bearer.header()
        if content is not None or method != "GET":
            told["Content-Length"] = str(len(content or b""))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"{method} {target} HTTP/1.1", *(f"{n}: {v}" for n, v in told.items())]
        if not all(line.isascii() and line.isprintable() for line in lines) or " " in target:
            raise httpx.ConnectError(f"a header, or the path {target!r}, is none of HTTP")
        return "\r\n".join([*lines, "", ""]).encode() + (content or b"")

    def _open(
        self, parts: SplitResult, server_name: str | None, timeout_s: float | None
    ) -> socket.socket:
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        connection: socket.socket | None = None
        try:
            connection = socket.create_connection((host, port), timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if parts.scheme != "https":
                return connection
            with self._lock:
                if isinstance(self._verify, bool):
                    self._verify = httpx.create_ssl_context(verify=self._verify)
            return self._verify.wrap_socket(connection, server_hostname=server_name or host)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                raise httpx.ConnectTimeout(str(error)) from error
            if isinstance(error, OSError | ValueError):
                raise httpx.ConnectError(str(error)) from error
            raise

    def _kept(self, key: _Key) -> socket.socket | None:
        """One that is open and idle; there is nothing to be read from such a one but its end."""
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                since, connection = idle.pop()
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            if time.monotonic() - since < _KEPT_S and not poll.poll(0):
                return connection
            connection.close()

    def _keep(self, key: _Key, connection: socket.socket) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._idle.setdefault(key, []).append((time.monotonic(), connection))
        return True

    def close(self) -> None:
        """End all that are idle, and each other one after its call.  Safe to call twice."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for _, connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()


def _number(text: bytes, base: int) -> int:
    """Digits alone: ``int`` takes signs, blanks and underscores, too."""
    text = text.strip()
    if not text.isalnum():
        raise httpx.RemoteProtocolError(f"no number of bytes: {text[:80]!r}")
    return int(text, base)


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except OSError as error:
        raise httpx.ReadError(str(error)) from error
    except ValueError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
