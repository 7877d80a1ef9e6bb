"""The embedded engine as a process: completions and pauses over HTTP."""

from __future__ import annotations

import http.server
import math
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers

from tests.support.models import VOCAB_SIZE, make_model
from tests.support.torch_host import ROOT, SECRET, TorchHost, running_torch_host, stop
from weightsync.codec import unpack
from weightsync.protocol import WorkerCommand, WorkerReply
from weightsync.worker_messages import DescribeReply

PROMPT = [5, 6, 7, 8]
LONG = 200
WAIT_S = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchHost]:
    with running_torch_host(model, tmp_path_factory.mktemp("log") / "engine.log") as host:
        yield host


@pytest.fixture
def engine(process: TorchHost) -> Iterator[httpx.Client]:
    """A client; the engine runs before and after each test."""
    with process.client() as client:
        yield client
        assert client.post("/weightsync/resume").status_code == 200
        until(lambda: load(client)["running"] + load(client)["waiting"] == 0)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.01)


def load(engine: httpx.Client) -> dict[str, Any]:
    return engine.get("/health").json()


def ask(max_tokens: int, prompt: list[int] = PROMPT) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "return_token_ids": True,
    }


def complete(engine: httpx.Client, max_tokens: int) -> dict[str, Any]:
    response = engine.post("/v1/completions", json=ask(max_tokens))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def pause(engine: httpx.Client, mode: str, timeout_s: float = 10.0) -> httpx.Response:
    return engine.post("/weightsync/pause", json={"mode": mode, "timeout_s": timeout_s})


def in_flight(
    engine: httpx.Client, background: ThreadPoolExecutor, max_tokens: int = LONG
) -> Future[dict[str, Any]]:
    before = load(engine)["tokens_made"]
    answer = background.submit(complete, engine, max_tokens)
    until(lambda: load(engine)["tokens_made"] > before + 1)
    return answer


@contextmanager
def reply_box() -> Iterator[tuple[str, queue.Queue[tuple[str, bytes]]]]:
    """A server that takes workers' replies: its address, and what came in as (secret, body)."""
    replies: queue.Queue[tuple[str, bytes]] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            replies.put((self.headers["X-Weightsync-Secret"], body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/reply", replies
        finally:
            server.shutdown()
            thread.join(WAIT_S)


def test_a_completion_is_what_transformers_computes(engine: httpx.Client, model: Path):
    reference = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    ids = list(PROMPT)
    logprobs = []
    with torch.inference_mode():
        for _ in range(6):
            row = reference(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))

    choice = complete(engine, 6)

    assert choice["token_ids"] == ids[len(PROMPT) :]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=0.05)
    assert choice["finish_reason"] == "length"
    assert choice["weight_version"] == 0


def test_the_same_request_gets_the_same_answer_to_the_last_bit(
    engine: httpx.Client, background: ThreadPoolExecutor
):
    alone = complete(engine, 20)
    together = [background.submit(complete, engine, 20) for _ in range(3)]
    assert [answer.result(WAIT_S) for answer in together] == [alone] * 3
    assert all(math.isfinite(value) for value in alone["logprobs"]["token_logprobs"])


def test_what_was_not_asked_for_is_not_answered(engine: httpx.Client):
    choice = engine.post("/v1/completions", json={"prompt": PROMPT, "model": "x"}).json()["choices"]
    assert "token_ids" not in choice[0]
    assert choice[0]["logprobs"] is None


def test_models_names_the_folder(engine: httpx.Client, model: Path):
    assert engine.get("/v1/models").json()["data"][0]["id"] == str(model)


def test_keep_freezes_a_request_in_flight_and_it_ends_the_same(
    engine: httpx.Client, background: ThreadPoolExecutor
):
    undisturbed = complete(engine, LONG)
    answer = in_flight(engine, background)

    assert pause(engine, "keep").status_code == 200
    frozen = load(engine)
    time.sleep(0.2)
    assert load(engine) == frozen
    assert frozen["running"] == 1
    assert not answer.done()
    assert engine.post("/weightsync/resume").status_code == 200

    assert answer.result(WAIT_S) == undisturbed


def test_wait_drains_and_later_requests_queue_until_resume(
    engine: httpx.Client, background: ThreadPoolExecutor
):
    answer = in_flight(engine, background, 100)

    assert pause(engine, "wait").status_code == 200

    assert load(engine)["running"] == 0
    assert answer.result(WAIT_S)["finish_reason"] == "length"
    late = background.submit(complete, engine, 2)
    until(lambda: load(engine)["waiting"] == 1)
    assert engine.get("/weightsync/is_paused").json()["is_paused"] is True
    time.sleep(0.1)
    assert not late.done()
    engine.post("/weightsync/resume")
    assert late.result(WAIT_S)["finish_reason"] == "length"


def test_abort_ends_a_request_in_flight_with_what_it_has(
    engine: httpx.Client, background: ThreadPoolExecutor
):
    answer = in_flight(engine, background)

    assert pause(engine, "abort").status_code == 200

    choice = answer.result(WAIT_S)
    assert choice["finish_reason"] == "abort"
    assert 0 < len(choice["token_ids"]) < LONG


def test_a_pause_over_its_deadline_says_so_and_resume_heals_it(
    engine: httpx.Client, background: ThreadPoolExecutor
):
    answer = in_flight(engine, background)

    assert pause(engine, "wait", timeout_s=0.01).json()["code"] == "deadline_exceeded"

    assert engine.post("/weightsync/resume").status_code == 200
    assert answer.result(WAIT_S)["finish_reason"] == "length"
    assert complete(engine, 1)["finish_reason"] == "length"


def test_a_client_that_leaves_while_paused_leaves_nothing_behind(
    engine: httpx.Client, process: TorchHost
):
    pause(engine, "keep")
    with (
        process.client(timeout_s=0.2) as impatient,
        pytest.raises(httpx.ReadTimeout),
    ):
        impatient.post("/v1/completions", json=ask(LONG))
    assert load(engine)["waiting"] == 1
    before = load(engine)["tokens_made"]
    time.sleep(0.5)  # the engine looks for lost clients every quarter of a second

    engine.post("/weightsync/resume")

    until(lambda: load(engine)["waiting"] == 0)
    assert complete(engine, 1)["finish_reason"] == "length"
    assert load(engine)["tokens_made"] == before + 1


def test_a_worker_command_is_answered_while_tokens_are_made(
    engine: httpx.Client, process: TorchHost, background: ThreadPoolExecutor
):
    answer = in_flight(engine, background)
    with reply_box() as (url, replies):
        command = WorkerCommand(call_id="c1", op="describe", reply_url=url, timeout_s=10)
        response = engine.post("/weightsync/rpc", content=command.model_dump_json())
        assert response.json() == {"call_id": "c1"}
        secret, reply = replies.get(timeout=WAIT_S)

    assert not answer.done()
    assert secret == SECRET
    described = unpack(WorkerReply.model_validate_json(reply).body, DescribeReply)
    assert (described.engine, described.pid) == ("torch", process.process.pid)
    assert answer.result(WAIT_S)["finish_reason"] == "length"


def test_the_middleware_names_the_engine(engine: httpx.Client, model: Path):
    info = engine.get("/weightsync/info").json()
    assert (info["engine"], info["model"], info["workers"]) == ("torch", str(model), 1)
    assert engine.post("/weightsync/reset_prefix_cache").json() == {"reset": True}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (ask(4, prompt=[]), "at least 1 item"),
        (ask(4, prompt=[-1]), "greater than or equal to 0"),
        (ask(4, prompt=[VOCAB_SIZE]), "vocabulary of 512"),
        (ask(0), "greater than or equal to 1"),
        (ask(509), "513 tokens, and the model takes 512"),
        (ask(4) | {"temperature": 1}, "Input should be 0"),
        (ask(4) | {"prompt": "text"}, "valid list"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(engine: httpx.Client, body, says):
    response = engine.post("/v1/completions", json=body)
    assert response.status_code == 422
    assert says in response.text


def test_sigterm_ends_it_in_good_order_with_frozen_requests_answered(
    model: Path, tmp_path: Path, background: ThreadPoolExecutor
):
    with (
        running_torch_host(model, tmp_path / "log", "--request-timeout-s", "2") as host,
        host.client() as engine,
    ):
        pause(engine, "keep")
        late = engine.post("/v1/completions", json=ask(2))
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        answer = background.submit(complete, engine, LONG)
        until(lambda: load(engine)["waiting"] == 2)

        assert stop(host.process) == 0

        assert answer.result(WAIT_S)["finish_reason"] == "abort"
        assert "Traceback" not in host.log.read_text()


@pytest.mark.parametrize("problem", ["port", "folder", "setting", "secret", "no model"])
def test_it_does_not_start_on_wrong_settings_and_says_why(tmp_path: Path, problem: str):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options, says = {
            "port": (
                ["--model", str(tmp_path), "--port", str(taken.getsockname()[1])],
                "cannot listen on 127.0.0.1",
            ),
            "folder": (["--model", str(tmp_path / "nothing"), "--port", "0"], "model"),
            "setting": (["--model", str(tmp_path), "--port", "-1"], "greater than or equal to 0"),
            "secret": (["--model", str(tmp_path), "--port", "0"], "16 or more"),
            "no model": (["--model", str(tmp_path), "--port", "0"], "config.json"),
        }[problem]
        ended = subprocess.run(
            [sys.executable, "-m", "weightsync_server.engines.torch_host", *options],
            env={
                "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}:{ROOT / 'client'}",
                "WEIGHTSYNC_ENGINE_SECRET": "short" if problem == "secret" else SECRET,
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            timeout=60,
            text=True,
            check=False,
        )
    assert ended.returncode != 0
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
