"""Whom the agent has the workers look for before the next rendezvous."""

from __future__ import annotations

import dataclasses

import pytest

from weightsync.codec import pack, unpack
from weightsync.errors import FencePendingError
from weightsync.process import Writer
from weightsync.worker_messages import ConnectBody

A, B, C = (Writer("host", 1, pid, 7) for pid in (11, 12, 13))


@pytest.fixture
def push(trainer, engine):
    """Opens a rendezvous for these writers and begins a push; who was fenced at its connect."""

    async def push(agent, number, *writers, version=None):
        t = trainer(agent, f"s{number}", f"p{number}")
        await t.init()
        fenced = await connect(t, *writers)
        await t.pause()
        await t.begin(version or number)
        return t, fenced

    async def connect(t, *writers):
        ranks = [
            {
                "rank": rank,
                "metadata": "bWV0YQ==",
                "writes": [pack([(0, 0, 16)])] * t.workers,
                "writer": dataclasses.asdict(writer),
            }
            for rank, writer in enumerate(writers)
        ]
        await t.agent.post("/connect", session=t.session, epoch=t.epoch, ranks=ranks)
        commands = [c for c in engine.client.workers[0].received if c.op == "connect"]
        return unpack(commands[-1].body_for(""), ConnectBody).fenced

    return push


async def say_released(t, writer):
    await t.agent.post(
        "/abort_update",
        session=t.session,
        push_id=t.push_id,
        released=dataclasses.asdict(writer),
    )


async def test_writers_of_a_push_that_was_given_up_are_looked_for(make_agent, engine, push):
    agent = await make_agent(engine.url, push_idle_timeout_s=0.2)
    await push(agent, 1, A, B)
    await agent.until("torn")
    assert (await push(agent, 2, C))[1] == [A, B]


async def test_a_trainers_abort_alone_is_no_word_of_all_its_ranks(agent, push):
    t, _ = await push(agent, 1, A, B)
    await t.abort()
    await say_released(t, A)
    assert (await push(agent, 2, C))[1] == [B]


async def test_with_everybodys_word_nobody_is_looked_for(agent, push):
    t, _ = await push(agent, 1, A, B)
    await say_released(t, B)  # the first word ends the push, too
    await say_released(t, A)
    assert (await push(agent, 2, C))[1] == []


async def test_processes_that_come_back_themselves_need_no_word(agent, push):
    t, _ = await push(agent, 1, A, B)
    await t.abort()
    t, fenced = await push(agent, 2, B, C)
    assert fenced == [A]
    await t.abort()
    assert (await push(agent, 3, B, C))[1] == [], "A was found gone"


async def test_a_commit_says_that_every_write_has_completed(agent, engine, push):
    engine.client.fail["commit"] = FencePendingError("any error", hint="h")
    t, _ = await push(agent, 1, A)
    await t.commit(1, expect=409)
    assert (await agent.status())["state"] == "torn"
    assert (await push(agent, 2, B))[1] == []


async def test_refused_workers_leave_the_fence_and_the_engine_as_they_were(agent, engine, push):
    t, _ = await push(agent, 1, A)
    await t.abort()
    engine.client.fail["connect"] = FencePendingError("process 11 lives", hint="end it", pids=[11])
    with pytest.raises(AssertionError, match="fence_pending"):
        await push(agent, 2, B)
    engine.client.fail.clear()
    assert (await push(agent, 3, B))[1] == [A]


async def test_the_next_agent_knows_whom_to_look_for(make_agent, engine, push, tmp_path):
    path = tmp_path / "journal"
    agent = await make_agent(engine.url, journal=path)
    await push(agent, 1, A)
    await agent.stop()
    agent = await make_agent(engine.url, wait="torn", journal=path)
    assert (await push(agent, 2, B))[1] == [A]


async def test_new_workers_were_never_in_reach(agent, engine, push):
    await push(agent, 1, A)
    await engine.restart()
    await agent.until("detached")
    await agent.until("ready")
    assert (await push(agent, 2, B))[1] == []
