"""An engine goes back to the checkpoint that it was started with, whole and never by /resume."""

from __future__ import annotations

import pytest
import pytest_asyncio

from weightsync.errors import NoCheckpointError, VerifyError


@pytest_asyncio.fixture
async def agent(make_agent, engine):
    for worker in engine.client.workers:
        worker.checkpoint = True
    return await make_agent(engine.url)


async def tear(agent, trainer, version=3):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(version)
    await t.abort()
    assert (await agent.status())["state"] == "torn"


async def test_a_torn_engine_reloads_its_checkpoint_and_serves(agent, engine, trainer):
    await tear(agent, trainer)
    answer = await agent.post("/reload")
    assert (answer["state"], answer["version"]) == ("ready", 0)
    assert {"pause", "reload", "install", "resume"} <= set(answer["seconds"])
    assert engine.client.ops[-4:] == ["pause", "reset_prefix_cache", "reload", "resume"]
    status = await agent.status()
    assert (status["session"], status["pause_owner"], status["target"]) == (None, None, None)
    assert [w["dirty"] for w in status["workers"]] == [False]
    assert await agent.ready_code() == 200


async def test_a_reload_counts_as_one_and_not_as_a_push_that_failed(agent, trainer):
    await (await trainer(agent).rendezvous()).push(5)
    await agent.post("/reload")
    last = (await agent.status())["last_push"]
    assert (last["outcome"], last["version"], last["nbytes"]) == ("reloaded", 0, 0)
    metrics = (await agent.http.get("/metrics")).text
    assert 'weightsync_pushes_total{outcome="reloaded"} 1.0' in metrics
    assert 'outcome="aborted"' not in metrics


async def test_versions_go_on_after_a_reload(agent, trainer):
    await (await trainer(agent).rendezvous()).push(5)
    assert (await agent.post("/reload"))["version"] == 0
    status = await agent.status()
    assert (status["version"], status["committed"], status["lowest"]) == (0, 5, 5)
    t = await trainer(agent, "s2", "p2").rendezvous()
    await t.pause()
    assert (await t.begin(4, expect=409))["code"] == "stale_version"
    await t.begin(5)


async def test_a_reload_ends_the_rendezvous_that_was_open(agent, trainer):
    t = await trainer(agent).rendezvous()
    await agent.post("/reload")
    await t.pause()
    assert (await t.begin(1, expect=409))["code"] == "stale_epoch"


async def test_a_reload_that_fails_half_way_leaves_the_engine_torn(agent, engine, trainer):
    worker = engine.client.workers[0]

    class HalfWayError(VerifyError):
        def to_problem(self):
            worker.dirty = True
            return super().to_problem()

    engine.client.fail["reload"] = HalfWayError("differs", hint="h")
    await agent.refused("/reload", 409, "verify_failed")
    status = await agent.status()
    assert (status["state"], status["pause_owner"]) == ("torn", None)
    await agent.refused("/resume", 409, "engine_torn")
    engine.client.fail.clear()
    assert (await agent.post("/reload"))["state"] == "ready"


async def test_a_refused_reload_of_a_torn_engine_repairs_nothing_and_forgets_nothing(
    agent, engine, trainer
):
    await tear(agent, trainer, version=9)
    engine.client.fail["reload"] = NoCheckpointError("none", hint="h")
    await agent.refused("/reload", 409, "no_checkpoint")
    status = await agent.status()
    assert (status["state"], status["lowest"], status["pause_owner"]) == ("torn", 9, None)
    assert engine.client.paused


async def test_an_engine_without_a_checkpoint_is_not_even_paused(make_agent, engine):
    agent = await make_agent(engine.url)
    answer = await agent.refused("/reload", 409, "no_checkpoint")
    assert "push again" in answer["hint"]
    assert "pause" not in engine.client.ops


async def test_a_reload_waits_for_nobodys_push_and_ends_no_persons_pause(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await agent.refused("/reload", 409, "push_in_progress")
    await t.begin(1)
    await agent.refused("/reload", 409, "push_in_progress")
    await t.commit(1)
    await t.resume()
    await agent.post("/pause")
    await agent.refused("/reload", 409, "engine_paused")
    assert "reload" not in engine.client.ops


async def test_with_require_push_a_reloaded_engine_is_syncing(make_agent, engine, trainer):
    engine.client.workers[0].checkpoint = True
    agent = await make_agent(engine.url, require_push=True)
    await (await trainer(agent).rendezvous()).push(1)
    await agent.post("/reload")
    gate = await agent.http.get("/readyz")
    assert (gate.status_code, gate.json()["code"]) == (503, "engine_syncing")


async def test_an_agent_that_dies_in_a_reload_finds_the_engine_torn(
    make_agent, engine, trainer, tmp_path
):
    worker = engine.client.workers[0]
    worker.checkpoint = True
    path = tmp_path / "journal"
    agent = await make_agent(engine.url, journal=path, engine_timeout_s=0.5)
    engine.client.hang.add("reload")
    worker.dirty = True  # as a worker is in mid-reload
    with pytest.raises(AssertionError, match="deadline_exceeded"):
        await agent.post("/reload", timeout_s=0.3)
    await agent.stop()
    engine.client.hang.clear()
    agent = await make_agent(engine.url, wait="torn", journal=path)
    assert (await agent.post("/reload"))["state"] == "ready"
