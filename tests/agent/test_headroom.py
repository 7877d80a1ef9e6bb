"""Room for shadows: told by /status, and with --require-shadow a condition of joining an engine."""

from __future__ import annotations

import pytest

from weightsync.errors import InputError
from weightsync.worker_messages import Headroom
from weightsync_server.agent.settings import load_settings

ENGINE = ["--engine-url", "http://127.0.0.1:8000"]


def rooms(engine, *each: list[Headroom]) -> None:
    for worker, headroom in zip(engine.client.workers, each, strict=True):
        worker.headroom = headroom


async def test_status_tells_what_a_shadow_needs_and_what_is_free(make_agent, make_engine):
    engine = await make_engine(2)
    gpu, host = Headroom("VRAM", 10, 0, 9), Headroom("DRAM", 70, 60, None)
    rooms(engine, [gpu, host], [gpu])
    agent = await make_agent(engine.url)
    told = [w["shadow_headroom"] for w in (await agent.status())["workers"]]
    as_told = {"kind": "VRAM", "needed_nbytes": 10, "held_nbytes": 0, "free_nbytes": 9}
    assert told[0][0] == told[1][0] == as_told
    assert told[0][1]["free_nbytes"] is None


@pytest.mark.parametrize(
    ("each", "needed", "free", "who"),
    [
        ([[Headroom("VRAM", 10, 0, 10)], [Headroom("VRAM", 11, 0, 10)]], 11, 10, "tp1"),
        # the host's memory is one: what several workers need of it adds up
        ([[Headroom("DRAM", 10, 0, 19)], [Headroom("DRAM", 10, 0, 19)]], 20, 19, "2 workers"),
    ],
    ids=["gpu", "host"],
)
async def test_with_require_shadow_an_engine_without_room_is_not_joined(
    make_agent, make_engine, each, needed, free, who
):
    engine = await make_engine(2)
    rooms(engine, *each)
    agent = await make_agent(engine.url, wait="detached", require_shadow=True)
    problem = await agent.post("/attach", expect=507)
    assert problem["code"] == "no_headroom"
    assert problem["context"] == {"needed_nbytes": needed, "free_nbytes": free}
    assert who in problem["detail"]
    for option in ("--gpu-memory-utilization", "--shadow-device cpu", "--max-shadow-nbytes"):
        assert option in problem["hint"]
    assert await agent.ready_code() == 503
    assert (await agent.status())["last_errors"][-1]["code"] == "no_headroom"
    rooms(engine, [], [])
    await agent.post("/attach")
    assert await agent.ready_code() == 200


@pytest.mark.parametrize(
    "each",
    [
        [[Headroom("VRAM", 10, 0, 10)], [Headroom("VRAM", 10, 9, 1)]],
        [[Headroom("DRAM", 10, 10, 2)], [Headroom("DRAM", 10, 8, 2)]],
        [[Headroom("DRAM", 10, 0, None)], []],
    ],
    ids=["fits", "held already", "unknown"],
)
async def test_with_require_shadow_an_engine_with_room_is_joined(make_agent, make_engine, each):
    engine = await make_engine(2)
    rooms(engine, *each)
    agent = await make_agent(engine.url, require_shadow=True)
    assert await agent.ready_code() == 200


def test_a_whole_shadow_cannot_be_required_of_a_partial_one():
    with pytest.raises(InputError, match="require_shadow is of all weights"):
        load_settings([*ENGINE, "--require-shadow", "--max-shadow-nbytes", "10"], {})
    assert load_settings([*ENGINE, "--require-shadow"], {}).require_shadow
