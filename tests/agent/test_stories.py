"""What others lived through with agents and engines, and can't be here."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from weightsync.errors import EngineError, VerifyError


async def test_story_resumed_half_updated_after_a_logged_error(agent, engine, trainer):
    """Elsewhere the failed write was logged, and `finally: resume` served the mixture."""
    engine.client.fail["commit"] = VerifyError("3 of 4 writes differ", hint="push again")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await t.commit(1, expect=409)
    for body in ({}, {"push_id": t.push_id}, {"push_id": "another"}):
        assert (await agent.post("/resume", expect=409, **body))["code"] == "engine_torn"
    assert engine.client.paused
    assert "resume" not in engine.client.ops
    assert await agent.ready_code() == 503
    engine.client.fail.clear()
    repair = await trainer(agent, "s2", "p2").rendezvous()
    assert (await repair.push(2))["state"] == "ready"


async def test_story_a_retried_update_that_was_not_idempotent(agent, engine, trainer):
    """Elsewhere a proxy repeated the update into an engine that was in the middle of it."""
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    answers = await asyncio.gather(*(t.commit(1) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)
    await asyncio.gather(*(t.resume() for _ in range(5)))
    assert await t.commit(1) == answers[0]  # and again, when the engine serves
    assert [engine.client.ops.count(op) for op in ("begin", "commit", "resume")] == [1, 1, 1]
    assert not engine.client.paused


async def test_story_a_version_counter_that_went_back_on_failover(
    make_agent, engine, agent, trainer
):
    """Elsewhere the restarted controller began at 1 again, and an engine went from 57 to 1."""
    first = await trainer(agent).rendezvous()
    await first.push(57)
    await agent.stop()
    restarted = await make_agent(engine.url)
    assert (await restarted.status())["version"] == 57
    again = trainer(restarted, "s2", "p2")
    assert (await again.init())["version"] == 57  # what a new trainer counts on from
    await again.connect()
    await again.pause()
    assert (await again.begin(1, expect=409))["code"] == "stale_version"
    assert (await again.begin(57, expect=409))["code"] == "stale_version"
    assert (await again.begin(58))["state"] == "receiving"


async def test_story_a_recovered_engine_that_got_traffic_on_old_weights(agent, engine, trainer):
    """Elsewhere an engine that came back took requests with the weights of its checkpoint."""
    t = await trainer(agent).rendezvous()
    await t.push(7)
    gate = "/readyz?min_version=7"
    assert (await agent.http.get(gate)).status_code == 200
    await engine.restart()
    async with asyncio.timeout(8):
        while (await agent.status())["version"] == 7:
            assert (await agent.http.get("/status")).status_code == 200
            await asyncio.sleep(0.02)
    await agent.until("ready")
    refused = await agent.http.get(gate)
    assert refused.status_code == 503
    assert refused.json()["code"] == "stale_version"
    await (await trainer(agent, "s2", "p2").rendezvous()).push(8)
    assert (await agent.http.get(gate)).status_code == 200


@pytest.mark.parametrize("op", ["layout", "connect", "begin", "commit"])
async def test_story_an_http_200_that_carries_an_error(agent, engine, trainer, op):
    """Elsewhere the server caught the error, said 200, and the trainer went on."""
    engine.client.fail[op] = EngineError("out of memory", hint="free some")
    t = trainer(agent)
    bodies = {
        "layout": t.init,
        "connect": t.connect,
        "begin": lambda: t.begin(1),
        "commit": lambda: t.commit(1),
    }
    for name, call in bodies.items():
        if name == "begin":
            await t.pause()
        if name != op:
            await call()
            continue
        with pytest.raises(AssertionError) as refused:  # of the client here: 200 was expected
            await call()
        assert "out of memory" in str(refused.value)
        assert "engine_error" in str(refused.value)
        return


async def test_story_a_cache_kept_after_an_update(agent, engine, trainer):
    """Elsewhere prefixes that the old weights had computed were served on with the new ones."""
    t = await trainer(agent).rendezvous()
    await t.push(1)
    ops = engine.client.ops
    assert ops.index("pause") < ops.index("reset_prefix_cache") < ops.index("resume")
    # an engine that can't drop them does not serve with them
    engine.client.fail["reset_returns_false"] = EngineError("never raised", hint="-")
    t.push_id = "p2"
    await t.pause()
    await t.begin(2)
    await t.commit(2, expect=502)
    assert (await agent.status())["state"] == "torn"
    assert engine.client.paused


async def test_story_a_load_balancer_sees_what_the_gate_says(agent, engine, trainer):
    """The gate is closed from the begin on, not only when something has gone wrong."""
    t = await trainer(agent).rendezvous()
    codes = [await agent.ready_code()]
    await t.pause()
    codes.append(await agent.ready_code())
    await t.begin(1)
    codes.append(await agent.ready_code())
    await t.commit(1)
    codes.append(await agent.ready_code())
    await t.resume()
    codes.append(await agent.ready_code())
    assert codes == [200, 503, 503, 503, 200]
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.get(agent.url + "/healthz")).status_code == 200
