"""Every body has a bound, on each way in, and what is over it is refused before it costs much."""

from __future__ import annotations

import base64
import zlib

import httpx
import pytest

from weightsync.codec import pack, unpack
from weightsync.errors import AgentUnreachableError, BodyTooLargeError
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_client import control
from weightsync_client.settings import Deadlines
from weightsync_server import middleware
from weightsync_server.agent.app import Agent
from weightsync_server.agent.auth import REPLY_PATH
from weightsync_server.agent.settings import AgentSettings
from weightsync_server.secret import HEADER

LIMIT = 100_000
UNPACKED = 1_000_000
BOMB = pack("x" * (4 * UNPACKED))
CALLS = [
    path
    for path, calls in Agent(
        AgentSettings(engine_url="http://127.0.0.1:9"), "a-secret-for-the-tests"
    )
    .app.openapi()["paths"]
    .items()
    if "post" in calls
]


@pytest.fixture
async def small(make_agent, engine):
    return await make_agent(engine.url, max_body_nbytes=LIMIT, max_unpacked_nbytes=UNPACKED)


async def endless():
    for _ in range(4):
        yield b" " * 65_536


async def test_no_call_takes_a_body_over_the_limit_told_or_untold(small, fakes):
    for path in (*CALLS, REPLY_PATH):
        headers = {HEADER: fakes.SECRET} if path == REPLY_PATH else {}
        for content in (b" " * (LIMIT + 1), endless()):
            answer = await small.http.post(path, content=content, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large"), path
    assert (await small.status())["state"] == "ready"


async def test_a_length_that_is_none_or_too_large_is_refused(agent):
    transport = httpx.ASGITransport(agent.agent.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for length in ("9" * 19, "9" * 5000, "-1", "0x10", "1e3"):
            answer = await http.post("/pause", headers={"Content-Length": length})
            assert answer.status_code in {413, 422}, length
            assert answer.json()["code"] in {"body_too_large", "invalid_input"}, length


async def test_no_packed_record_inflates_beyond_its_limit(small, trainer):
    assert len(BOMB) < LIMIT
    t = trainer(small)
    await small.refused(
        "/init_transfer", 413, "body_too_large",
        protocol_version=PROTOCOL_VERSION, session="s", manifest=BOMB,
    )  # fmt: skip
    await t.init()
    at = {"session": t.session, "epoch": t.epoch}
    ranks = [{"rank": 0, "metadata": "bWV0YQ==", "writes": [BOMB]}]
    await small.refused("/connect", 413, "body_too_large", **at, ranks=ranks)
    await t.connect()
    await t.pause()
    digests = [{"rank": 0, "digests": [BOMB]}]
    await small.refused("/verify", 413, "body_too_large", **at, ranks=digests)
    await t.begin(1)
    await small.refused("/commit_update", 413, "body_too_large", **t.step, version=1, ranks=digests)
    assert (await t.commit(1))["version"] == 1  # the push itself took no harm


def test_a_record_that_inflates_a_thousandfold_is_stopped_at_its_limit():
    bomb = base64.b64encode(zlib.compress(b"\0" * 20_000_000, 9)).decode()
    with pytest.raises(BodyTooLargeError):
        unpack(bomb, str, max_nbytes=UNPACKED)


async def test_the_engines_server_takes_no_body_over_its_limit(engine, fakes, monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BODY_NBYTES", LIMIT)
    async with httpx.AsyncClient(base_url=engine.url, trust_env=False) as http:
        for path in ("/weightsync/rpc", "/weightsync/pause"):
            answer = await http.post(path, content=endless(), headers={HEADER: fakes.SECRET})
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_trainer_takes_no_answer_over_its_limit(monkeypatch):
    monkeypatch.setattr(control, "MAX_ANSWER_NBYTES", LIMIT)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=b" " * (LIMIT + 1)))
    with (
        control.Fleet(["http://a:1"], token=None, deadlines=Deadlines(), transport=transport) as f,
        pytest.raises(AgentUnreachableError, match=f"over {LIMIT} bytes"),
    ):
        f.agents[0].get("/status", timeout_s=5)


WRONG = [{"session": "s" * 129}, {"session": "a b"}, {"world_size": 0}, {"world_size": 2**70},
     {"timeout_s": 1e9}, {"timeout_s": -1}, {"session": ["s"]}, {"manifest": {"tensors": 7}},
     {"manifest": {"tensors": [{"name": "n" * 1025, "dtype": "bfloat16", "shape": []}]}},
     {"manifest": {"tensors": [{"name": "n", "dtype": "bfloat16", "shape": [1] * 17}]}},
     {"manifest": {"tensors": [{"name": "n", "dtype": "bfloat16", "shape": [-1]}]}},
     {"manifest": {"tensors": [{"name": "n", "dtype": "bfloat16", "shape": [2**62]}]}}]  # fmt: skip


async def test_fields_are_bounded(agent, trainer):
    body = {
        "protocol_version": PROTOCOL_VERSION,
        "session": "s",
        "manifest": trainer(agent).manifest(),
    }
    for wrong in WRONG:
        await agent.refused("/init_transfer", 422, "invalid_input", **body | wrong)
