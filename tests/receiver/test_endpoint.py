"""The door of a worker: commands in, replies out."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from weightsync.codec import pack, unpack
from weightsync.errors import (
    InputError,
)
from weightsync.protocol import WorkerCommand, WorkerReply
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync.worker_messages import (
    AbortBody,
    AttachBody,
    BeginBody,
    DescribeReply,
)
from weightsync_server.receiver.endpoint import WorkerEndpoint
from weightsync_server.receiver.reply import ReplyLine
from weightsync_server.secret import HEADER, load_secret


class Inbox:
    """An agent that takes replies."""

    def __init__(self) -> None:
        replies = self.replies = []
        headers = self.headers = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                headers.append(self.headers[HEADER])
                replies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/reply"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def inbox(monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTSYNC_ENGINE_SECRET", "x" * 40)
    made = Inbox()
    yield made
    made.close()


def command(inbox: Inbox, op: str, **rest: object) -> str:
    return WorkerCommand(
        call_id="call-1", op=op, reply_url=inbox.url, timeout_s=5, **rest
    ).model_dump_json()


def test_a_command_is_answered_with_the_secret(engine, inbox):
    endpoint = WorkerEndpoint(engine, lambda: InMemoryTransport(Fabric()))
    endpoint.call(command(inbox, "describe"))
    reply = WorkerReply.model_validate(inbox.replies[0])
    assert unpack(reply.body, DescribeReply).engine == "toy"
    assert inbox.headers == [load_secret()]


def test_a_worker_reads_the_body_for_its_own_place(engine, inbox):
    endpoint = WorkerEndpoint(engine, lambda: InMemoryTransport(Fabric()))
    bodies = {str(engine.place): pack(AttachBody("full")), "elsewhere": pack(AbortBody("p"))}
    endpoint.call(command(inbox, "attach", bodies=bodies))
    assert inbox.replies[0]["problem"] is None


@pytest.mark.parametrize(
    ("op", "body", "code"),
    [
        ("begin", pack(BeginBody(1, 1, "p")), "no_session"),
        ("begin", pack("nonsense"), "invalid_input"),
        ("commit", "no base64!", "invalid_input"),
    ],
)
def test_failures_are_answered_as_problems(op, body, code, engine, inbox):
    endpoint = WorkerEndpoint(engine, lambda: InMemoryTransport(Fabric()))
    endpoint.call(command(inbox, op, body=body))
    assert inbox.replies[0]["problem"]["code"] == code


def test_what_is_no_command_is_an_error_of_the_caller(engine):
    endpoint = WorkerEndpoint(engine, lambda: InMemoryTransport(Fabric()))
    with pytest.raises(InputError, match=r"not a worker command: .*op: Input should be") as caught:
        endpoint.call('{"op": "a secret"}')
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message


def test_an_agent_that_is_gone_does_not_hurt_the_worker(engine, inbox, caplog):
    endpoint = WorkerEndpoint(engine, lambda: InMemoryTransport(Fabric()))
    gone = command(inbox, "describe").replace(inbox.url, "http://127.0.0.1:9/reply")
    endpoint.call(gone)
    assert "could not be delivered" in caplog.text


class KeptInbox(Inbox):
    """Keeps connections, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.connections = []
        connections, handler = self.connections, self.server.RequestHandlerClass

        class Kept(handler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                connections.append(self.connection)

            def end_headers(self) -> None:
                self.send_header("Content-Length", "0")
                super().end_headers()

        self.server.RequestHandlerClass = Kept


def test_answers_go_over_one_connection_and_over_another_where_it_was_closed(monkeypatch):
    monkeypatch.setenv("WEIGHTSYNC_ENGINE_SECRET", "x" * 40)
    inbox, line = KeptInbox(), ReplyLine()
    inbox.server.timeout = 5
    answers = [WorkerReply(call_id=f"c{k}", place="p", instance="i") for k in range(3)]
    try:
        for answer in answers[:2]:
            line.post(inbox.url, answer)
        assert len(inbox.connections) == 1
        inbox.connections[0].shutdown(socket.SHUT_RDWR)  # as an agent that ends what is idle
        line.post(inbox.url, answers[2])
        assert [r["call_id"] for r in inbox.replies] == ["c0", "c1", "c2"]
        assert len(inbox.connections) == 2
    finally:
        line.close()
        inbox.close()


def test_an_answer_that_nobody_takes_is_logged_and_no_more(monkeypatch, caplog):
    monkeypatch.setenv("WEIGHTSYNC_ENGINE_SECRET", "x" * 40)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/internal/reply"
        ReplyLine().post(url, WorkerReply(call_id="c0", place="p", instance="i"))
    assert f"the reply to c0 could not be delivered to {url}" in caplog.text
