"""One count of pauses and resumes for all server processes of an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from weightsync.errors import DeadlineError, EngineError, StateError
from weightsync_server.engines import vllm_compat
from weightsync_server.engines.vllm_compat import server_processes
from weightsync_server.middleware import WeightsyncMiddleware
from weightsync_server.turns import Turns, server_turns


@pytest.fixture
def two(tmp_path):
    """As two processes would have them."""
    return Turns(os.getpid(), tmp_path), Turns(os.getpid(), tmp_path)


async def take(turns: Turns, asked: str | None, **options) -> str:
    async with turns.take(asked, 0.05, **options) as turn:
        return turn


async def test_what_one_process_hears_late_is_void_after_another_was_asked(two):
    one, other = two
    first = await take(one, None)
    second = await take(other, first)
    with pytest.raises(StateError, match="after this was sent"):
        await take(one, first)
    assert await take(one, second, last=True) == second
    third = await take(one, second)
    assert len({first, second, third}) == 3
    with pytest.raises(StateError):
        await take(other, second, last=True)


async def test_nobody_has_a_turn_while_another_process_is_in_its_own(two):
    one, other = two
    async with one.take(None, 1) as turn:
        with pytest.raises(DeadlineError, match="kept its turn"):
            await take(other, None)
    assert await take(other, turn) != turn


async def test_a_count_that_cannot_be_shared_is_an_error_that_names_the_option(tmp_path):
    turns = Turns(os.getpid(), tmp_path)
    (tmp_path / "aside").write_text("9")
    assert turns._path is not None
    turns._path.symlink_to(tmp_path / "aside")  # as another user might
    with pytest.raises(EngineError) as caught:
        await take(turns, None)
    assert "--api-server-count 1" in caught.value.hint
    assert (tmp_path / "aside").read_text() == "9"


def test_one_of_several_processes_that_does_not_know_the_others_is_refused():
    with pytest.raises(EngineError) as caught:
        server_turns(2)  # nobody started this process as one of several
    assert "--api-server-count 1" in caught.value.hint


def test_what_engines_that_are_over_have_left_is_removed(tmp_path):
    left = tmp_path / f"weightsync-turns-{os.geteuid()}-{os.getpid()}-1"  # a pid that came again
    left.write_text("4")
    Turns(os.getpid(), tmp_path)
    assert not left.exists()


def test_vllms_config_tells_how_many_there_are():
    parallel = SimpleNamespace(_api_process_count=2)
    client = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
    assert server_processes(client) == 2
    assert server_processes(SimpleNamespace()) == 1


async def test_an_engine_whose_server_processes_do_not_know_each_other_is_not_joined(
    make_agent, engine, monkeypatch
):
    monkeypatch.setattr(vllm_compat, "server_processes", lambda _: 2)
    agent = await make_agent(engine.url, wait="detached")
    problem = await agent.post("/attach", expect=502)
    assert problem["code"] == "engine_error"
    assert "--api-server-count 1" in problem["hint"]
    assert await agent.ready_code() == 503


async def test_a_resume_that_one_server_hears_late_starts_nothing_that_another_has_paused(
    fakes, two
):
    client = fakes.FakeClient()
    servers = []
    for turns in two:
        app = FastAPI()
        app.state.engine_client = client
        middleware = WeightsyncMiddleware(app, fakes.SECRET)
        middleware._turns = turns

        async def call(name, body=None, *, middleware=middleware, app=app):
            async def served(scope, receive, send):
                await middleware(scope | {"app": app}, receive, send)

            transport = httpx.ASGITransport(served, client=("127.0.0.1", 1))
            headers = {fakes.HEADER: fakes.SECRET}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", headers=headers
            ) as http:
                url = f"/weightsync/{name}"
                answer = await (http.get(url) if body is None else http.post(url, json=body))
                return answer.json()

        servers.append(call)
    one, other = servers
    late = (await one("pause", {}))["turn"]
    now = (await other("is_paused"))["turn"]
    assert (await other("pause", {"turn": now}))["is_paused"]
    assert (await one("resume", {"turn": late}))["code"] == "illegal_state"
    assert client.paused


CHILD = """
import asyncio, multiprocessing, sys
from weightsync_server.turns import server_turns

async def take():
    async with server_turns(2).take(None, 5) as turn:
        return turn

def serve(queue):
    queue.put(asyncio.run(take()))

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    for _ in range(2):
        child = spawn.Process(target=serve, args=(queue,))
        child.start()
        print(queue.get(timeout=20), flush=True)
        child.join(10)
"""


def test_processes_that_vllm_spawns_find_one_count(tmp_path):
    script = tmp_path / "servers.py"
    script.write_text(CHILD)
    ran = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    first, second = ran.stdout.split()
    engine, _, count = first.rpartition(":")
    assert second == f"{engine}:{int(count) + 1}"
