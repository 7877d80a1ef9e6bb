"""The agent's own small HTTP client: connections are kept, and what is no answer is an error."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from weightsync_server.agent.engine_http import Connections

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@contextlib.asynccontextmanager
async def server(*answers: bytes, closes: bool = False):
    """Answers each request with the next of ``answers``; counts connections and keeps requests."""
    left, seen = list(answers), []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                seen.append((head, await reader.readexactly(length)))
                writer.write(left.pop(0))
                await writer.drain()
                if closes:
                    break
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    http = Connections(f"http://127.0.0.1:{port}", {"X-Secret": "s"})
    try:
        yield http, seen, lambda: connections
    finally:
        http.close()
        listening.close()
        await asyncio.sleep(0.02)  # until the server has seen its connections end


async def test_requests_one_after_another_share_a_connection() -> None:
    async with server(ANSWER, ANSWER) as (http, seen, connections):
        assert await http.request("POST", "/a", b"body") == (200, b"{}")
        assert await http.request("GET", "/b") == (200, b"{}")
        assert connections() == 1
    assert seen[0][0].startswith(b"POST /a HTTP/1.1\r\n")
    assert seen[0][1] == b"body"
    assert b"X-Secret: s\r\n" in seen[1][0]


async def test_a_connection_that_the_server_ended_is_not_used_again() -> None:
    async with server(ANSWER, ANSWER, closes=True) as (http, _, connections):
        for _ in range(2):
            assert await http.request("GET", "/") == (200, b"{}")
            await asyncio.sleep(0.02)
        assert connections() == 2


async def test_a_request_that_is_cancelled_takes_its_connection_along() -> None:
    async with server(b"", ANSWER) as (http, _, connections):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(http.request("GET", "/"), 0.05)
        assert await http.request("GET", "/") == (200, b"{}")
        assert connections() == 2


async def test_an_answer_without_a_length_is_taken_as_empty_and_its_connection_ends() -> None:
    chunked = b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    async with server(chunked, ANSWER) as (http, _, connections):
        assert await http.request("GET", "/") == (404, b"")
        assert await http.request("GET", "/") == (200, b"{}")
        assert connections() == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort",
        b"x" * 100_000,
        b"",
    ],
    ids=["no HTTP", "no status", "cut off", "endless head", "nothing"],
)
async def test_what_is_no_whole_answer_is_a_broken_connection(answer: bytes) -> None:
    async with server(answer, closes=True) as (http, _, _):
        with pytest.raises(OSError, match=r"."):
            await http.request("GET", "/")
