"""Connections that stay open while they are good, and what their failures are called."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from weightsync_client.wire import Connections

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Server:
    """Gives the answers of a list, one a request; None hangs up instead."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers = answers
        self.accepted = 0
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while self.answers:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # shut down
                return
            self.accepted += 1
            with connection:
                while self.answers and (request := connection.recv(1 << 16)):
                    if b"Content-Length" in request and request.endswith(b"\r\n\r\n"):
                        request += connection.recv(1 << 16)  # the body comes by itself
                    self.requests.append(request)
                    answer = self.answers.pop(0)
                    if answer is None:
                        break
                    connection.sendall(answer)
                    if answer.endswith(b"early"):
                        break

    def close(self) -> None:
        self.answers.clear()
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, as close alone does not
        self.thread.join(5)
        self.listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(*answers: bytes | None) -> Server:
        made.append(Server(list(answers)))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def wire() -> Iterator[Connections]:
    connections = Connections({"X-Mine": "1"}, None, verify=True)
    yield connections
    connections.close()


def ask(wire: Connections, url: str, content: bytes | None = None, **options: Any) -> bytes:
    options = {"timeout": httpx.Timeout(2), "extensions": {}, **options}
    method = "GET" if content is None else "POST"
    with wire.stream(method, url, content=content, **options) as answer:
        return b"%d " % answer.status_code + b"".join(answer.iter_bytes())


def test_calls_share_a_connection_and_carry_headers_query_and_body(
    serve: Callable[..., Server], wire: Connections
) -> None:
    chunked = b"HTTP/1.1 409 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 65537\r\n\r\n" + b"x" * 65537
    server = serve(OK, chunked, large, OK)
    assert ask(wire, f"{server.url}/a?b=c", headers={"X-Call": "2"}) == b"200 body"
    assert ask(wire, f"{server.url}/d", b"hello") == b"409 abc"
    assert len(ask(wire, server.url + "/e")) == 4 + 65537
    assert ask(wire, server.url + "/e") == b"200 body"
    assert server.accepted == 1
    first, second = server.requests[0], b"".join(server.requests[1:])
    assert first.startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert b"X-Mine: 1\r\n" in first
    assert b"X-Call: 2\r\n" in first
    assert b"Content-Length: 5\r\n" in second
    assert b"\r\n\r\nhello" in second


@pytest.mark.parametrize("how", ["close", "unread", "said"])
def test_a_connection_that_is_not_good_any_more_is_not_used_again(
    how: str, serve: Callable[..., Server], wire: Connections
) -> None:
    goodbye = OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    server = serve(goodbye if how == "said" else OK, OK)
    if how == "unread":
        options: Any = {"timeout": httpx.Timeout(2), "extensions": {}}
        with wire.stream("GET", server.url + "/", **options) as answer:
            assert answer.status_code == 200
    else:
        ask(wire, server.url + "/")
    if how == "close":
        (kept,) = wire._idle.values()
        kept[0][1].shutdown(socket.SHUT_RD)  # what the end of the far side looks like
    assert ask(wire, server.url + "/") == b"200 body"
    assert server.accepted == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nearly", httpx.RemoteProtocolError),
        (b"no http at all\r\n\r\nearly", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\n", httpx.ReadTimeout),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart", httpx.ReadTimeout),
    ],
    ids=["hangs up", "ends too early", "no HTTP", "no headers", "no rest"],
)
def test_an_answer_that_does_not_come_whole_is_an_error(
    answer: bytes | None,
    error: type[Exception],
    serve: Callable[..., Server],
    wire: Connections,
) -> None:
    server = serve(answer, OK)
    with pytest.raises(error):
        ask(wire, server.url + "/", timeout=httpx.Timeout(0.2))
    assert ask(wire, server.url + "/") == b"200 body"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4_0\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000,
        b"HTTP/2 200 OK\r\n\r\n",
        CHUNKED + b"4\r\nlonger\r\n0\r\n\r\n",
        CHUNKED + b"no\r\nbody\r\n0\r\n\r\n",
        CHUNKED + b"9\r\nearly",
    ],
    ids=[
        "less than nothing", "no number", "headers", "long line", "version",
        "long chunk", "no size", "early end",
    ],
)  # fmt: skip
def test_an_answer_that_breaks_the_rules_is_none(
    answer: bytes, serve: Callable[..., Server], wire: Connections
) -> None:
    server = serve(answer, OK)
    with pytest.raises(httpx.RemoteProtocolError):
        ask(wire, server.url + "/")
    assert ask(wire, server.url + "/") == b"200 body"
    assert server.accepted == 2


def test_bodies_without_a_length_end_with_the_connection_and_chunks_may_have_trailers(
    serve: Callable[..., Server], wire: Connections
) -> None:
    trailed = CHUNKED + b"4;x=y\r\nbody\r\n1\r\n!\r\n0\r\nDate: now\r\n\r\n"
    early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    none = b"HTTP/1.1 204 No Content\r\n\r\n"
    server = serve(early + trailed, none, b"HTTP/1.1 200 OK\r\n\r\nall there early", OK)
    assert ask(wire, server.url) == b"200 body!"
    assert ask(wire, server.url) == b"204 "
    assert ask(wire, server.url) == b"200 all there early"
    assert server.accepted == 1
    assert ask(wire, server.url) == b"200 body"
    assert server.accepted == 2


@pytest.mark.parametrize("path", ["/a b", "/a\x00", "/é"])
def test_nothing_is_sent_that_is_no_request(
    path: str, serve: Callable[..., Server], wire: Connections
) -> None:
    server = serve(OK)
    with pytest.raises(httpx.ConnectError, match="none of HTTP"):
        ask(wire, server.url + path)
    with pytest.raises(httpx.ConnectError, match="none of HTTP"):
        ask(wire, server.url, headers={"X-Call": "1\r\nX-Other: 2"})
    assert not server.accepted


def test_nobody_there_is_no_connection(wire: Connections) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/", f"https://127.0.0.1:{port}/"):
        with pytest.raises(httpx.ConnectError, match="refused"):
            ask(wire, url)


def test_after_close_a_connection_ends_with_its_call(
    serve: Callable[..., Server], wire: Connections
) -> None:
    server = serve(OK, OK)
    with wire.stream("GET", server.url + "/", timeout=httpx.Timeout(2), extensions={}) as answer:
        wire.close()
        assert b"".join(answer.iter_bytes()) == b"body"
    assert not wire._idle
