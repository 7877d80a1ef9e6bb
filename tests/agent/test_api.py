"""The agent's door: bodies, tokens, events, metrics, and pushes that fall silent."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from pathlib import Path

import pytest

from weightsync.codec import pack
from weightsync.errors import InputError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_server.agent.cli import main

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"mode": "keep"', b'{"mode": 1e999}', b"\xff\xfe", b"null"]
)
async def test_a_malformed_body_is_a_problem_and_changes_nothing(agent, body):
    response = await agent.http.post(
        "/pause", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 422
    assert response.json()["code"] == "invalid_input"
    assert response.json()["hint"]
    assert (await agent.status())["state"] == "ready"


async def test_fields_that_nobody_knows_are_refused_by_name(agent):
    answer = await agent.refused("/pause", 422, "invalid_input", mode="keep", speed=11)
    assert "speed" in json.dumps(answer)
    assert (await agent.status())["state"] == "ready"


async def test_a_body_over_the_limit_is_refused_before_it_is_read(make_agent, engine):
    agent = await make_agent(engine.url, max_body_nbytes=100_000)
    response = await agent.http.post("/pause", content=b" " * 100_001)
    assert response.status_code == 413
    assert (await agent.status())["state"] == "ready"


async def test_a_manifest_that_inflates_without_bound_is_refused(make_agent, engine):
    agent = await make_agent(engine.url, max_unpacked_nbytes=1_000_000)
    bomb = pack([("a" * 1000, "float32", (1,), "")] * 20_000)
    assert len(bomb) < 1_000_000
    await agent.refused(
        "/init_transfer", 413, "body_too_large",
        protocol_version=PROTOCOL_VERSION, session="s", manifest=bomb,
    )  # fmt: skip
    status = await agent.status()
    assert (status["state"], status["session"]) == ("ready", None)


async def test_a_token_is_asked_of_every_call_but_health(make_agent, engine):
    agent = await make_agent(engine.url, token="right-" + "x" * 20)
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
        response = await agent.http.get("/status", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert (await agent.http.get("/healthz", headers={"Authorization": ""})).status_code == 200
    assert (await agent.http.get("/status")).status_code == 200


def test_an_address_that_others_reach_needs_a_token(monkeypatch, capsys):
    monkeypatch.delenv("WEIGHTSYNC_TOKEN", raising=False)
    with pytest.raises((SystemExit, InputError)) as stopped:
        raise SystemExit(main(["--engine-url", "http://127.0.0.1:9", "--host", "0.0.0.0"]))
    assert getattr(stopped.value, "code", 1) not in (0, None)
    assert "token" in (capsys.readouterr().err + str(stopped.value)).lower()


async def test_openapi_lists_every_call_of_the_protocol(agent):
    told = set(re.findall(r"`(?:GET|POST) (/[a-z_]+)`", PROTOCOL.read_text()))
    listed = set((await agent.http.get("/openapi.json")).json()["paths"])
    assert len(told) > 10
    assert told - {"/openapi", "/docs"} <= listed


async def test_every_change_of_state_is_an_event(agent, trainer):
    states = []

    async def listen() -> None:
        async with agent.http.stream("GET", "/events") as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:") and "state" in (told := json.loads(line[5:])):
                    states.append(told["state"])
                    if states[-3:] == ["receiving", "paused", "ready"]:
                        return

    listening = asyncio.create_task(listen())
    while not states:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await (await trainer(agent).rendezvous()).push(1)
    await asyncio.wait_for(listening, 5)
    assert [s for s, before in zip(states, [None, *states], strict=False) if s != before] == [
        "ready", "paused", "receiving", "paused", "ready",
    ]  # fmt: skip


async def test_metrics_tell_the_version_that_is_served(agent, trainer):
    await (await trainer(agent).rendezvous()).push(7)
    text = (await agent.http.get("/metrics")).text
    assert re.search(r"^weightsync_version(\{.*\})? 7\.0$", text, re.MULTILINE), text


async def test_a_push_that_falls_silent_before_begin_gives_the_engine_back(
    make_agent, engine, trainer
):
    agent = await make_agent(engine.url, push_idle_timeout_s=0.3)
    t = await trainer(agent).rendezvous()
    await t.pause()
    assert (await agent.until("ready"))["version"] == 0
    assert not engine.client.paused


async def test_a_push_that_falls_silent_while_it_writes_leaves_the_engine_torn(
    make_agent, engine, trainer
):
    agent = await make_agent(engine.url, push_idle_timeout_s=0.3)
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    status = await agent.until("torn")
    assert "not heard of" in status["last_errors"][-1]["detail"]
    assert engine.client.paused
    await agent.refused("/resume", 409, "engine_torn")


async def test_a_repeated_begin_keeps_a_long_write_alive(make_agent, engine, trainer):
    agent = await make_agent(engine.url, push_idle_timeout_s=0.6)
    t = await trainer(agent).rendezvous()
    await t.pause()
    for _ in range(6):
        await t.begin(1)
        await asyncio.sleep(0.2)
    assert (await t.commit(1))["version"] == 1


async def test_why_a_trainer_gave_up_is_in_the_log(agent, trainer, caplog):
    t = await trainer(agent).rendezvous()
    await t.pause()
    with caplog.at_level(logging.WARNING):
        await agent.post(
            "/abort_update", session=t.session, push_id=t.push_id, reason="write: a cable is out"
        )
    assert "a cable is out" in caplog.text


async def test_checksums_are_refused_while_a_push_writes(agent, trainer):
    t = await trainer(agent).rendezvous()
    assert (await agent.http.get("/checksums")).json()["version"] == 0
    await t.pause()
    await t.begin(1)
    response = await agent.http.get("/checksums")
    assert (response.status_code, response.json()["code"]) == (409, "push_in_progress")
