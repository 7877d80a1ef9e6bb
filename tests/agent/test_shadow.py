"""Pushes in shadow mode and rollbacks, call by call, against a fake engine."""

from __future__ import annotations

import pytest

from weightsync.errors import EngineError, VerifyError


@pytest.fixture
def shadowed(agent, trainer):
    """A trainer whose rendezvous and begins are of shadow mode."""

    async def made(push_id: str = "p1"):
        t = trainer(agent, session="s-shadow", push_id=push_id)
        await t.init(mode="shadow")
        await t.connect()
        return t

    return made


async def prepare(t, version: int, expect: int = 200):
    ranks = t.ranks("digests", [b"d" * 16, b"e" * 16])
    body = t.step | {"version": version, "ranks": ranks}
    return await t.agent.post("/prepare_commit", expect=expect, **body)


async def test_the_caches_are_reset_with_the_pause_and_not_before(agent, engine, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    await prepare(t, 1)
    assert "reset_prefix_cache" not in engine.client.ops
    await t.pause()
    assert engine.client.ops[-2:] == ["pause", "reset_prefix_cache"]
    await t.commit(1, ranks=[])
    await t.resume()
    t.push_id = "p2"
    await t.begin(2, mode="shadow", reset_prefix_cache=False)
    await prepare(t, 2)
    await t.pause()
    await t.commit(2, ranks=[])
    assert engine.client.ops.count("reset_prefix_cache") == 1


async def test_caches_that_will_not_reset_leave_what_was_served(agent, engine, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    await prepare(t, 1)
    engine.client.fail["reset_returns_false"] = RuntimeError()
    assert (await t.pause(expect=502))["code"] == "engine_error"
    assert "commit" not in engine.client.ops
    status = await agent.status()
    assert (status["state"], status["version"]) == ("ready", 0)
    assert not engine.client.paused


async def push(t, version: int):
    t.push_id = f"p{version}"
    await t.begin(version, mode="shadow")
    await prepare(t, version)
    await t.pause()
    await t.commit(version, ranks=[])
    return await t.resume()


async def test_the_engine_serves_until_everything_is_written_and_checked(agent, engine, shadowed):
    t = await shadowed()
    assert (await t.begin(3, mode="shadow"))["state"] == "shadowing"
    assert not engine.client.paused
    assert await agent.ready_code() == 200
    status = await agent.status()
    assert (status["target"], status["pause_owner"]) == (3, "p1")
    assert not status["workers"][0]["dirty"]
    prepared = await prepare(t, 3)
    assert prepared["state"] == "shadowing"
    assert {"digest", "prepare"} <= set(prepared["seconds"])
    assert not engine.client.paused
    assert (await t.pause())["state"] == "receiving"
    assert await agent.ready_code() == 503
    committed = await t.commit(3, ranks=[])
    assert (committed["state"], committed["version"]) == ("paused", 3)
    assert (await t.resume())["state"] == "ready"
    assert engine.client.ops == [
        "close", "attach", "layout", "connect", "begin", "prepare", "pause",
        "reset_prefix_cache", "commit", "resume",
    ]  # fmt: skip
    last = (await agent.status())["last_push"]
    assert last["outcome"] == "committed"
    assert [p["phase"] for p in last["phases"]] == [
        "begin", "write", "prepare", "pause", "commit", "resume",
    ]  # fmt: skip
    assert last["seconds"]["paused"] < sum(p["seconds"] for p in last["phases"])


async def test_a_commit_before_the_pause_is_refused(agent, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    refused = await t.commit(1, expect=409)
    assert refused["code"] == "illegal_state"
    assert (await agent.status())["state"] == "shadowing"


async def test_nobody_else_touches_the_engine_meanwhile(agent, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    await agent.refused("/pause", 409, "push_in_progress")
    await agent.refused("/rollback", 409, "push_in_progress")
    await agent.refused("/attach", 409, "push_in_progress")
    assert (await agent.post("/resume"))["state"] == "shadowing"


async def test_an_abort_before_the_pause_leaves_the_engine_serving(agent, engine, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    await prepare(t, 1)
    assert (await t.abort())["state"] == "ready"
    status = await agent.status()
    assert (status["version"], status["session"], status["pause_owner"]) == (0, None, None)
    assert not {"pause", "resume"} & set(engine.client.ops)


async def test_an_abort_after_the_pause_resumes_the_old_version(agent, engine, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    await t.pause()
    await t.abort()
    assert (await agent.status())["state"] == "ready"
    assert not engine.client.paused
    await agent.refused("/commit_update", 409, "stale_epoch", **t.step, version=1, ranks=[])


async def test_wrong_bytes_are_told_before_the_pause(agent, engine, shadowed):
    t = await shadowed()
    engine.client.fail["prepare"] = VerifyError("bytes differ")
    await t.begin(1, mode="shadow")
    assert (await prepare(t, 1, expect=409))["code"] == "verify_failed"
    assert (await agent.status())["state"] == "ready"
    assert "pause" not in engine.client.ops


async def test_a_pause_that_fails_costs_the_push_and_not_the_engine(agent, engine, shadowed):
    t = await shadowed()
    await t.begin(1, mode="shadow")
    engine.client.fail["pause"] = RuntimeError("no")
    await t.pause(expect=502)
    assert (await agent.status())["state"] == "ready"
    assert not engine.client.paused
    assert engine.client.ops[-3:] == ["abort", "close", "resume"]


async def test_workers_that_keep_silent_before_the_pause_leave_the_engine_serving(
    agent, engine, shadowed
):
    t = await shadowed()
    engine.client.hang.add("begin")
    await t.begin(1, mode="shadow", timeout_s=0.3, expect=504)
    status = await agent.status()
    assert (status["state"], status["session"]) == ("ready", None)


async def test_a_rollback_serves_the_version_before_and_versions_go_on_growing(
    agent, engine, shadowed
):
    t = await shadowed()
    await push(t, 4)
    status = await agent.status()
    assert (status["rollback_to"], status["rolled_back_from"]) == (0, 0)
    await push(t, 5)
    engine.client.calls.clear()
    answer = await agent.post("/rollback")
    assert (answer["state"], answer["version"]) == ("ready", 4)
    assert {"pause", "reset_prefix_cache", "install", "rollback", "resume"} <= set(
        answer["seconds"]
    )
    assert engine.client.ops == ["pause", "reset_prefix_cache", "rollback", "resume"]
    status = await agent.status()
    assert (status["version"], status["rollback_to"], status["rolled_back_from"]) == (4, None, 5)
    last = status["last_push"]
    assert (last["outcome"], last["version"], last["nbytes"]) == ("rolled_back", 5, 0)
    # once is all there is
    refused = await agent.refused("/rollback", 409, "no_previous_version")
    assert "no version before 4" in refused["detail"]
    assert not engine.client.paused
    t.push_id = "p5b"
    assert (await t.begin(5, mode="shadow", expect=409))["code"] == "stale_version"
    assert (await push(t, 6))["version"] == 6


async def test_a_rollback_names_the_version_that_it_gives_up(agent, shadowed):
    t = await shadowed()
    await push(t, 1)
    await agent.refused("/rollback", 409, "illegal_state", version=2)
    assert (await agent.post("/rollback", version=1))["version"] == 0


async def test_a_push_that_holds_the_engine_takes_itself_back(agent, engine, shadowed):
    t = await shadowed()
    await push(t, 1)
    t.push_id = "p2"
    await t.begin(2, mode="shadow")
    await t.pause()
    await t.commit(2)
    await agent.refused("/rollback", 409, "push_in_progress")
    first = await agent.post("/rollback", push_id="p2", version=2)
    assert (first["state"], first["version"]) == ("ready", 1)
    assert not engine.client.paused
    assert await agent.post("/rollback", push_id="p2", version=2) == first


async def test_a_hand_paused_engine_is_not_rolled_back(agent, shadowed):
    t = await shadowed()
    await push(t, 1)
    await agent.post("/pause")
    await agent.refused("/rollback", 409, "engine_paused")
    assert (await agent.status())["state"] == "paused"


async def test_an_engine_torn_in_the_exchange_is_mended_by_a_rollback(agent, engine, shadowed):
    t = await shadowed()
    await push(t, 1)
    t.push_id = "p2"
    await t.begin(2, mode="shadow")
    await t.pause()
    worker = engine.client.workers[0]
    worker.dirty, worker.rollback_to = True, 1
    engine.client.fail["commit"] = EngineError("out of luck")
    await t.commit(2, expect=502)
    status = await agent.status()
    assert (status["state"], status["rollback_to"]) == ("torn", 1)
    await agent.refused("/resume", 409, "engine_torn")
    assert await agent.ready_code() == 503
    answer = await agent.post("/rollback")
    assert (answer["state"], answer["version"]) == ("ready", 1)
    assert not engine.client.paused


async def test_a_rollback_that_fails_before_it_changes_anything_resumes(agent, engine, shadowed):
    t = await shadowed()
    await push(t, 1)
    engine.client.fail["rollback"] = EngineError("not now")
    await agent.refused("/rollback", 502, "engine_error")
    status = await agent.status()
    assert (status["state"], status["version"], status["rollback_to"]) == ("ready", 1, 0)
    assert not engine.client.paused
    del engine.client.fail["rollback"]
    assert (await agent.post("/rollback"))["version"] == 0


async def test_a_torn_engine_takes_a_shadow_push_in_the_order_of_a_direct_one(
    agent, engine, shadowed
):
    t = await shadowed()
    engine.client.workers[0].dirty = True
    assert (await agent.post("/attach"))["state"] == "torn"
    t = await shadowed("p2")
    assert (await t.begin(1, mode="shadow", expect=409))["code"] == "illegal_state"
    await t.pause()
    assert (await t.begin(1, mode="shadow"))["state"] == "receiving"
    await prepare(t, 1)
    assert (await t.commit(1, ranks=[]))["state"] == "paused"
    assert (await t.resume())["version"] == 1
