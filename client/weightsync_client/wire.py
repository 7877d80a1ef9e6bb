"""HTTP/1.1 over connections that stay open, with little of Python between a call and its bytes.

A push makes a handful of calls, on the thread that pushes: ``http.client`` takes a third of the
time that httpx takes for one.  What fails is told as httpx would tell it.
"""

from __future__ import annotations

import http.client
import select
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
#: a connection that lay idle for longer may be gone at the far end, or on the way
_KEPT_S = 60.0

_Key = tuple[str, str, str | None]


class Answer:
    """A response whose body is read as it comes; the names are those of ``httpx.Response``."""

    def __init__(
        self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection
    ) -> None:
        self.status_code = response.status
        self.headers = response.headers
        self.extensions: dict[str, Any] = {"network_stream": self}
        #: nothing of it is left on the connection
        self.whole = False
        self._response = response
        self._tls = connection.sock if isinstance(connection.sock, ssl.SSLSocket) else None

    def get_extra_info(self, name: str) -> ssl.SSLSocket | None:
        """The socket, as ``ssl_object`` of a connection with TLS."""
        return self._tls if name == "ssl_object" else None

    def iter_bytes(self) -> Iterator[bytes]:
        """The body in parts, each as soon as it is there.

        Raises:
            httpx.TransportError: The connection ended before it did, or nothing came for too long.
        """
        response = self._response
        with _as_httpx():
            if response.chunked:
                while chunk := response.read1(_CHUNK_NBYTES):
                    yield chunk
            else:
                # what read1() of a response makes of an early end differs between versions
                left = -1 if response.length is None else response.length
                most = _CHUNK_NBYTES
                while left and (chunk := response.fp.read1(min(left, most) if left > 0 else most)):
                    left -= len(chunk) if left > 0 else 0
                    yield chunk
                if left > 0:
                    raise httpx.RemoteProtocolError(f"the connection ended {left} bytes too early")
        response.close()
        self.whole = True


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
        self._idle: dict[_Key, list[tuple[float, http.client.HTTPConnection]]] = {}
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
        origin = f"{parts.scheme}://{parts.netloc}"
        sent = {**self._headers, **(headers or {})}
        if self._bearer is not None:
            sent["Authorization"] = self._bearer.header()
        connection = self._kept(key) or self._open(parts, key[2], timeout.connect)
        answer = None
        try:
            connection.sock.settimeout(timeout.read)
            with _as_httpx():
                # who hangs up on a request may have answered it before
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, url.removeprefix(origin), content, sent)
                answer = Answer(connection.getresponse(), connection)
            yield answer
        finally:
            if answer is None or not answer.whole or not self._keep(key, connection):
                connection.close()

    def _open(
        self, parts: SplitResult, server_name: str | None, timeout_s: float | None
    ) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        try:
            connection = http.client.HTTPConnection(
                host, parts.port or (443 if parts.scheme == "https" else 80), timeout=timeout_s
            )
            connection.connect()
            connection.auto_open = 0  # it would forget about TLS
            if parts.scheme == "https":
                with self._lock:
                    if isinstance(self._verify, bool):
                        self._verify = httpx.create_ssl_context(verify=self._verify)
                connection.sock = self._verify.wrap_socket(
                    connection.sock, server_hostname=server_name or host
                )
        except TimeoutError as error:
            connection.close()
            raise httpx.ConnectTimeout(str(error)) from error
        except (OSError, ValueError) as error:
            connection.close()
            raise httpx.ConnectError(str(error)) from error
        return connection

    def _kept(self, key: _Key) -> http.client.HTTPConnection | None:
        """One that is open and idle; there is nothing to be read from such a one but its end."""
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                since, connection = idle.pop()
            poll = select.poll()
            poll.register(connection.sock, select.POLLIN)
            if time.monotonic() - since < _KEPT_S and not poll.poll(0):
                return connection
            connection.close()

    def _keep(self, key: _Key, connection: http.client.HTTPConnection) -> bool:
        with self._lock:
            if self._closed or connection.sock is None:
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


@contextmanager
def _as_httpx() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except http.client.HTTPException as error:  # a server that hung up is one, too
        raise httpx.RemoteProtocolError(str(error) or type(error).__name__) from error
    except OSError as error:
        raise httpx.ReadError(str(error)) from error
