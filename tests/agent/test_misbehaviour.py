"""Engines that hang or keep silent, callers that repeat loosely, listeners that lag, clocks."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from weightsync.errors import EngineError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_server.agent import events as hub_module
from weightsync_server.agent.events import EventHub


@pytest.fixture(autouse=True)
def _short_margins(monkeypatch):
    for name in ("_MARGIN_S", "_STRAGGLER_S"):
        monkeypatch.setattr(f"weightsync_server.agent.engine_client.{name}", 0.2)


# ------------------------------------------------------------------ engines


@pytest.mark.parametrize("call", ["pause", "begin", "commit"])
async def test_an_engine_that_hangs_in_a_call_is_given_up_at_its_deadline(
    agent, engine, trainer, call
):
    t = await trainer(agent).rendezvous()
    steps = {
        "pause": t.pause,
        "begin": lambda **more: t.begin(1, **more),
        "commit": lambda **more: t.commit(1, **more),
    }
    for name, step in steps.items():
        if name == call:
            break
        await step()
    engine.client.hang.add(call)
    asked = time.monotonic()
    failed = await steps[call](expect=504, timeout_s=0.3)
    assert failed["code"] == "deadline_exceeded"
    assert time.monotonic() - asked < 4
    engine.client.hang.clear()
    if call == "pause":
        assert (await agent.until("ready"))["pause_owner"] is None
    else:
        # nobody can tell what the workers did of it
        assert (await agent.status())["state"] == "torn"


async def test_a_resume_that_hangs_may_be_asked_for_again(make_agent, engine, trainer):
    agent = await make_agent(engine.url, engine_timeout_s=0.3)
    t = await trainer(agent).rendezvous()
    await t.pause()
    engine.client.hang.add("resume")
    assert (await t.resume(expect=504))["code"] == "deadline_exceeded"
    assert (await agent.status())["state"] == "paused"
    engine.client.hang.clear()
    assert (await t.resume())["state"] == "ready"


async def test_a_worker_that_keeps_silent_is_named_and_tears_the_push(
    make_engine, make_agent, trainer
):
    engine = await make_engine(2)
    agent = await make_agent(engine.url)
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    silent = str(engine.client.workers[1].place)
    engine.client.silent.add(silent)
    failed = await t.commit(1, expect=502)
    assert silent in failed["detail"]
    assert str(engine.client.workers[0].place) not in failed["detail"]
    status = await agent.status()
    assert status["state"] == "torn"
    assert await agent.ready_code() == 503


async def test_a_command_that_all_workers_have_answered_is_not_waited_for(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    engine.client.linger.update({"begin", "commit"})
    await t.push(1)
    assert (await agent.status())["state"] == "ready"
    assert engine.client.ops[-5:] == ["pause", "begin", "reset_prefix_cache", "commit", "resume"]


async def test_answers_with_another_secret_or_for_no_call_are_not_taken(agent):
    reply = {"call_id": "c", "place": "engine0/dp0/pp0/tp0/ep0", "instance": "x"}
    async with httpx.AsyncClient(base_url=agent.url, trust_env=False) as http:
        for headers in ({}, {"X-Weightsync-Secret": "another secret, as long"}):
            answer = await http.post("/internal/reply", json=reply, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        headers = {"X-Weightsync-Secret": "s3cret-of-the-tests"}
        answer = await http.post("/internal/reply", json=reply, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "illegal_state")


async def test_an_engine_that_goes_in_mid_push_and_returns_is_pushed_to_again(
    agent, engine, trainer
):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await engine.restart()
    await agent.until("detached")
    status = await agent.until("ready")
    assert (status["version"], status["session"], status["pause_owner"]) == (0, None, None)
    assert (await t.commit(1, expect=409))["code"] in ("no_session", "stale_epoch")
    await (await trainer(agent, "s2", "p2").rendezvous()).push(2)


async def test_everything_that_is_not_ours_goes_to_the_engine_untouched(engine):
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False) as http:
        assert (await http.get("/v1/ping")).json() == {"pong": True}
        assert (await http.get("/weightsync")).status_code == 404
        assert (await http.get("/weightsync/info")).status_code == 401


async def test_an_attach_by_hand_that_fails_leaves_a_serving_engine_as_it_was(
    agent, engine, trainer
):
    t = await trainer(agent).rendezvous()
    engine.client.fail["attach"] = EngineError("its checkpoint is damaged", hint="mend it")
    await agent.refused("/attach", 502, "engine_error", proof="full")
    status = await agent.status()
    assert (status["state"], status["session"]) == ("ready", t.session)
    assert await agent.ready_code() == 200
    engine.client.fail.clear()
    assert (await agent.post("/attach", proof="full"))["state"] == "ready"
    await t.push(1)


async def test_an_attach_by_hand_that_finds_no_engine_detaches(agent, engine):
    await engine.stop()
    await agent.refused("/attach", 503, "engine_detached")
    assert (await agent.status())["state"] == "detached"


# ------------------------------------------------------------------ callers


async def test_a_repeated_commit_with_other_digests_is_no_repeat(agent, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    first = await t.commit(1)
    assert await t.commit(1, timeout_s=7) == first, "how long to wait is no part of what is asked"
    await t.commit(1, expect=422, reset_prefix_cache=False)
    other = [{"rank": 0, "digests": [""] * t.workers}]
    await t.commit(1, expect=422, ranks=other)


async def test_a_repeated_rendezvous_with_another_alias_is_no_repeat(agent, trainer):
    t = await trainer(agent).rendezvous()
    tensor = {"name": "a", "dtype": "float32", "shape": [4], "alias_of": "b"}
    other = {"name": "b", "dtype": "float32", "shape": [4]}
    for tensors in ([tensor, other], [{**other, "name": "a"}, other]):
        await agent.refused(
            "/init_transfer", 422, "invalid_input",
            protocol_version=PROTOCOL_VERSION, session=t.session, manifest={"tensors": tensors},
        )  # fmt: skip


# ------------------------------------------------------------------ listeners and clocks


async def test_a_listener_that_lags_is_cut_off_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(hub_module, "_BACKLOG", 3)
    hub = EventHub()
    stream = hub.stream({"state": "ready"}, last_id=None, heartbeat_s=60)
    assert "ready" in await anext(stream)
    for number in range(10):
        hub.publish("state", {"n": number})  # never waits
    got = [text async for text in stream]
    assert [f'"n": {n}' in text for n, text in enumerate(got)] == [True] * 3
    again = hub.stream({"state": "ready"}, last_id=3, heartbeat_s=60)
    missed = [await anext(again) for _ in range(8)]
    assert '"n": 3' in missed[1]
    assert '"n": 9' in missed[-1]
    await again.aclose()


async def test_a_clock_that_jumps_ends_no_push_and_delays_no_deadline(
    make_agent, engine, trainer, monkeypatch
):
    agent = await make_agent(engine.url, push_idle_timeout_s=0.8)
    t = await trainer(agent).rendezvous()
    await t.pause()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)
    await asyncio.sleep(0.3)
    assert (await agent.status())["state"] == "paused"
    assert (await t.begin(1))["state"] == "receiving"
    monkeypatch.setattr(time, "time", lambda: real() - 1e6)
    asked = time.monotonic()
    await agent.until("torn")
    assert 0.5 < time.monotonic() - asked < 5
