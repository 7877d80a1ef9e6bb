"""A rendezvous is its trainer's alone, and the engine's calls are for this host alone."""

from __future__ import annotations

import httpx
import pytest

from weightsync.protocol import PROTOCOL_VERSION, SESSION_SECRET_HEADER
from weightsync_server.agent.session_guard import _KEPT
from weightsync_server.middleware import WeightsyncMiddleware
from weightsync_server.same_host import is_loopback
from weightsync_server.secret import HEADER

MINE, THEIRS = {SESSION_SECRET_HEADER: "mine-" + "m" * 30}, {SESSION_SECRET_HEADER: "theirs"}
SECRET = "a-secret-of-an-engine"


@pytest.fixture
def as_mine(agent):
    agent.http.headers.update(MINE)
    return agent


def calls(t):
    """Every call that names a session."""
    ranks = [{**t.ranks("writes", [(0, 0, 16), (1, 0, 8)])[0], "metadata": "bWV0YQ=="}]
    digests = t.ranks("digests", [b"d" * 16, b"e" * 16])
    session = {"session": t.session, "epoch": t.epoch}
    return {
        "/init_transfer": {
            "protocol_version": PROTOCOL_VERSION, "session": t.session, "manifest": t.manifest(),
        },
        "/connect": session | {"ranks": ranks},
        "/begin_update": t.step | {"version": 1},
        "/commit_update": t.step | {"version": 1, "ranks": digests},
        "/verify": session | {"ranks": digests},
    }  # fmt: skip


@pytest.mark.parametrize("headers", [THEIRS, {}])
async def test_who_knows_the_session_but_not_its_secret_is_refused(
    as_mine, engine, trainer, headers
):
    t = trainer(as_mine)
    await t.init()
    async with httpx.AsyncClient(base_url=as_mine.url, headers=headers, trust_env=False) as other:

        async def refused() -> None:
            for path, body in calls(t).items():
                answer = await other.post(path, json=body)
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), path

        seen = engine.client.ops
        await refused()  # its NIXL metadata would come here
        assert engine.client.ops == seen
        await t.connect()
        await t.pause()
        await refused()
        await t.begin(1)
        await refused()
        assert (await t.commit(1))["version"] == 1
        await refused()  # not even a remembered answer
        await t.resume()


async def test_a_flood_of_other_sessions_opens_no_one_elses(as_mine, trainer):
    t = await trainer(as_mine).rendezvous()
    await t.pause()  # from here on every other rendezvous is refused
    body = calls(t)["/init_transfer"]
    async with httpx.AsyncClient(base_url=as_mine.url, headers=THEIRS, trust_env=False) as other:
        for n in range(_KEPT + 1):
            answer = await other.post("/init_transfer", json=body | {"session": f"flood-{n}"})
            assert answer.json()["code"] == "push_in_progress"
        for path in calls(t):
            answer = await other.post(path, json=calls(t)[path])
            assert answer.json()["code"] == "forbidden", path


async def test_a_person_may_abort_a_push_whoever_opened_its_session(as_mine, trainer):
    t = await trainer(as_mine).rendezvous()
    await t.pause()
    body = {"session": t.session, "push_id": t.push_id, "reason": "it is late"}
    answer = await as_mine.http.post("/abort_update", json=body, headers=THEIRS)
    assert answer.json()["state"] == "ready"


async def test_another_trainer_opens_a_session_of_its_own(as_mine, trainer):
    await trainer(as_mine).rendezvous()
    as_mine.http.headers.update(THEIRS)
    await (await trainer(as_mine, session="s2", push_id="p2").rendezvous()).push(1)
    assert (await as_mine.status())["version"] == 1


async def test_no_answer_and_no_log_line_holds_a_session_secret(as_mine, trainer, caplog):
    caplog.set_level(0)
    t = await trainer(as_mine).rendezvous()
    text = (await as_mine.http.get("/status")).text + str(await t.init())
    assert "mmm" not in text + caplog.text


# ---------------------------------------------------------------- the engine's server


@pytest.fixture
def engine_server():
    """Calls of a client at an address to an engine's server at another."""

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    middleware = WeightsyncMiddleware(app, secret=SECRET)

    async def get(client: str, server: str, path: str = "/weightsync/info") -> httpx.Response:
        transport = httpx.ASGITransport(middleware, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{server}") as http:
            return await http.get(path, headers={HEADER: SECRET})

    return get


@pytest.mark.parametrize("client", ["10.0.0.9", "2001:db8::9", "host.example"])
async def test_the_engines_calls_are_closed_to_other_hosts_that_have_the_secret(
    engine_server, client
):
    answer = await engine_server(client, "10.0.0.1")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert client in answer.json()["detail"]
    assert (await engine_server(client, "10.0.0.1", "/v1/models")).status_code == 204


@pytest.mark.parametrize(
    ("client", "server"),
    [("127.0.0.1", "10.0.0.1"), ("::1", "localhost"), ("10.0.0.1", "10.0.0.1")],
)
async def test_the_engines_calls_are_open_to_this_host(engine_server, client, server):
    answer = await engine_server(client, server)
    assert answer.json()["detail"] == "the engine has not started yet"


def test_loopback_is_told_from_every_other_address():
    assert all(is_loopback(a) for a in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"))
    assert not any(is_loopback(a) for a in ("0.0.0.0", "10.0.0.1", "::", "::ffff:10.0.0.1", "x"))
