"""A resume that the engine hears late, or never answers, starts nothing that is written to."""

from __future__ import annotations

import httpx
import pytest


async def test_an_engine_that_may_have_resumed_takes_no_writes_until_it_is_paused_again(
    make_agent, engine, trainer
):
    agent = await make_agent(engine.url, engine_timeout_s=0.1)
    t = await trainer(agent).rendezvous()
    await t.pause()
    engine.client.hang.add("resume")  # it is heard, and no answer comes
    await t.resume(expect=504)
    assert (await agent.status())["state"] == "paused"
    error = await t.begin(1, expect=409)
    assert error["code"] == "illegal_state"
    assert "/pause" in error["hint"]
    engine.client.hang.clear()
    assert (await t.abort())["state"] == "ready"
    t.push_id = "p2"
    assert (await t.push(1))["version"] == 1


async def test_a_resume_that_was_sent_before_the_last_pause_starts_nothing(fakes, engine, agent):
    await agent.post("/pause")
    late = await _ask_engine(fakes, engine, "GET", "is_paused")
    await agent.post("/resume")
    await agent.post("/pause")
    refused = await _ask_engine(fakes, engine, "POST", "resume", {"turn": late["turn"]})
    assert refused["code"] == "illegal_state"
    assert engine.client.paused
    assert (await agent.post("/resume"))["state"] == "ready"
    assert not engine.client.paused


@pytest.mark.parametrize("op", ["rollback", "reload"])
async def test_a_rollback_that_was_sent_before_the_last_resume_changes_nothing(
    fakes, engine, agent, op
):
    await agent.post("/pause")
    turn = (await _ask_engine(fakes, engine, "GET", "is_paused"))["turn"]
    await agent.post("/resume")
    late = {
        "call_id": "late", "op": op, "reply_url": f"{agent.url}/internal/reply", "timeout_s": 5,
        "turn": turn,
    }  # fmt: skip
    refused = await _ask_engine(fakes, engine, "POST", "rpc", late)
    assert refused["code"] == "illegal_state"
    assert op not in engine.client.ops


async def test_an_agent_that_joins_again_voids_what_was_sent_before_it_looks(fakes, engine, agent):
    turn = (await _ask_engine(fakes, engine, "GET", "is_paused"))["turn"]
    engine.client.calls.clear()
    await agent.post("/attach")
    assert engine.client.calls.index("is_paused") < engine.client.calls.index("describe")
    refused = await _ask_engine(fakes, engine, "POST", "resume", {"turn": turn})
    assert refused["code"] == "illegal_state"


async def test_an_agent_that_did_not_hear_of_a_pause_can_still_end_it(make_agent, engine):
    agent = await make_agent(engine.url, engine_timeout_s=2)
    engine.client.hang.add("pause")
    await agent.post("/pause", expect=504, timeout_s=0.1)
    engine.client.hang.clear()
    assert not engine.client.paused
    assert (await agent.status())["state"] == "ready"


async def _ask_engine(fakes, engine, method, name, body=None):
    async with httpx.AsyncClient(trust_env=False, headers={fakes.HEADER: fakes.SECRET}) as http:
        url = f"{engine.url}/weightsync/{name}"
        return (await http.request(method, url, json=body)).json()
