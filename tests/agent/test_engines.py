"""Several engines behind one agent are one engine to trainers, load balancers and people."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from weightsync.errors import EngineError, InputError, TraceError, VerifyError
from weightsync_server.agent.settings import load_settings

FIRST, SECOND = "engine0/dp0/pp0/tp0/ep0", "engine1/dp0/pp0/tp0/ep0"
URLS = ("http://127.0.0.1:8000", "http://127.0.0.1:8001")


@pytest_asyncio.fixture
async def engines(make_engine):
    return [await make_engine(), await make_engine()]


@pytest_asyncio.fixture
async def agent(make_agent, engines):
    return await make_agent([engine.url for engine in engines])


async def test_status_lists_all_engines_and_their_workers_by_logical_place(agent, engines):
    status = await agent.status()
    assert [e["url"] for e in status["engines"]] == [e.url for e in engines]
    assert len({e["instance"] for e in status["engines"]}) == 2
    assert [w["place"] for w in status["workers"]] == [FIRST, SECOND]
    assert len({w["instance"] for w in status["workers"]}) == 2


async def test_a_push_reaches_every_worker_of_every_engine(make_agent, make_engine, trainer):
    engines = [await make_engine(workers=2), await make_engine()]
    agent = await make_agent([engine.url for engine in engines])
    push = await trainer(agent).rendezvous()
    assert push.workers == 3
    await push.push(1)
    for engine in engines:
        assert engine.client.ops[-4:] == ["begin", "reset_prefix_cache", "commit", "resume"]
        assert [w.version for w in engine.client.workers] == [1] * engine.n
    status = await agent.status()
    assert (status["state"], status["version"]) == ("ready", 1)
    sums = (await agent.http.get("/checksums")).json()["sha256"]
    assert sorted(sums) == [
        "engine0/dp0/pp0/tp0/ep0/a", "engine0/dp0/pp0/tp1/ep0/a", "engine1/dp0/pp0/tp0/ep0/a",
    ]  # fmt: skip


async def test_commands_carry_only_what_is_for_the_engines_own_workers(agent, engines, trainer):
    await trainer(agent).rendezvous()
    for engine, place in zip(engines, (FIRST, SECOND), strict=True):
        command = next(c for c in engine.client.workers[0].received if c.op == "connect")
        assert list(command.bodies) == [place]


async def test_one_engine_that_cannot_be_paused_leaves_both_running(agent, engines, trainer):
    push = await trainer(agent).rendezvous()
    engines[1].client.fail["pause"] = RuntimeError("stuck")
    await push.pause(expect=502)
    assert (await agent.until("ready"))["version"] == 0
    assert [engine.client.paused for engine in engines] == [False, False]


async def test_a_commit_that_fails_at_one_engine_tears_the_whole(agent, engines, trainer):
    push = await trainer(agent).rendezvous()
    await push.pause()
    await push.begin(1)
    engines[1].client.fail["commit"] = VerifyError("bytes differ", hint="push again")
    failed = await push.commit(1, expect=409)
    assert failed["code"] == "verify_failed"
    assert SECOND in failed["detail"]
    assert (await agent.status())["state"] == "torn"
    assert [engine.client.paused for engine in engines] == [True, True]
    assert await agent.ready_code() == 503
    engines[1].client.fail.clear()
    await (await trainer(agent, "s2", "p2").rendezvous()).push(2)
    assert (await agent.status())["version"] == 2


async def test_an_engine_that_goes_away_detaches_all_and_is_named(agent, engines):
    await engines[1].stop()
    status = await agent.until("detached")
    async with asyncio.timeout(8):
        while not status["last_errors"]:  # the next attempt to attach says why
            await asyncio.sleep(0.02)
            status = await agent.status()
    assert engines[1].url in status["last_errors"][-1]["detail"]
    assert engines[0].url not in status["last_errors"][-1]["detail"]
    assert await agent.ready_code() == 503


async def test_a_pause_ends_at_once_when_an_engine_dies_of_it(agent, engines, trainer):
    """vLLM's server may live on, and never answer what its engine was asked."""
    push = await trainer(agent).rendezvous()
    engines[1].client.hang.add("pause")
    started = time.monotonic()
    pausing = asyncio.create_task(push.pause(expect=503, timeout_s=20))
    await asyncio.sleep(0.2)
    engines[1].client.errored = True
    assert (await pausing)["code"] == "engine_detached"
    assert time.monotonic() - started < 10
    assert (await agent.status())["state"] == "detached"


async def test_an_engine_that_restarts_with_old_weights_tears_and_stops_the_other(
    agent, engines, trainer
):
    await (await trainer(agent).rendezvous()).push(1)
    await engines[1].restart()
    status = await agent.until("torn")
    assert status["target"] == 2
    assert [engine.client.paused for engine in engines] == [True, True]


async def test_an_engine_that_was_paused_by_itself_has_the_others_paused_too(make_agent, engines):
    engines[0].client.paused = True
    agent = await make_agent([engine.url for engine in engines], wait="paused")
    assert [engine.client.paused for engine in engines] == [True, True]
    await agent.post("/resume")
    assert [engine.client.paused for engine in engines] == [False, False]


async def test_what_several_engines_refuse_is_told_together(agent, engines, trainer):
    for number, engine in enumerate(engines):
        refusal = {"tensor": f"t{number}", "reason": "unproven"}
        engine.client.fail["layout"] = TraceError("cannot", hint="h", refusals=[refusal])
    failed = await trainer(agent).agent.post(
        "/init_transfer", expect=422, session="s", protocol_version=1,
        manifest=trainer(agent).manifest(),
    )  # fmt: skip
    assert [r["tensor"] for r in failed["context"]["refusals"]] == ["t0", "t1"]


async def test_two_workers_that_name_one_place_are_never_taken_for_one(make_agent, make_engine):
    """As vLLM's data-parallel engines of a dense model would by their rank."""
    engine = await make_engine(workers=2)
    engine.client.workers[1].place = engine.client.workers[0].place
    agent = await make_agent(engine.url, wait=None)
    answer = await agent.post("/attach", expect=502)
    assert answer["code"] == EngineError.code
    assert f"two workers say that they are {FIRST}" in answer["detail"]
    assert (await agent.status())["state"] == "detached"


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--engine-url", URLS[0], "--engine-url", URLS[1]], {}),
        (["--engine-url", ",".join(URLS)], {}),
        ([], {"WEIGHTSYNC_AGENT_ENGINE_URL": f"{URLS[0]}/, {URLS[1]}"}),
    ],
    ids=["flags", "one flag", "environment"],
)
def test_several_engines_are_given_by_flags_or_by_a_list(argv, environ):
    assert load_settings(argv, environ).engine_url == URLS


@pytest.mark.parametrize("given", [[URLS[0], URLS[0]], [f"{URLS[0]},"], ["no-address"], []])
def test_engines_that_are_named_twice_or_not_at_all_are_refused(given):
    argv = [word for url in given for word in ("--engine-url", url)]
    with pytest.raises(InputError, match="engine_url"):
        load_settings(argv, {})
