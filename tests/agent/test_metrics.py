"""What Prometheus gets: of pushes that went well, that failed, and of calls that were refused."""

from __future__ import annotations

import asyncio
import itertools
import logging

from prometheus_client.parser import text_string_to_metric_families

from weightsync.codec import pack
from weightsync.errors import VerifyError


async def scrape(agent) -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels."""
    text = (await agent.http.get("/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_push_is_counted_by_phase_bytes_rank_and_worker(make_engine, make_agent, trainer):
    engine = await make_engine(workers=2)
    agent = await make_agent(engine.url)
    t = trainer(agent)
    await t.init()
    writes = [pack([(0, 0, 16), (1, 0, 8)])] * 2
    await agent.post(
        "/connect",
        session=t.session,
        epoch=t.epoch,
        ranks=[
            {"rank": rank, "metadata": "bWV0YQ==", "writes": writes if rank else ["", ""]}
            for rank in (0, 1, 70)
        ],
    )
    for version in (1, 2):
        t.push_id = f"p{version}"
        await t.push(version)
    got = await scrape(agent)
    assert got["weightsync_pushes_total", "committed"] == 2
    assert got["weightsync_received_bytes_total",] == 2 * 2 * 2 * 24
    assert got["weightsync_rank_received_bytes_total", "1"] == 2 * 2 * 24
    assert got["weightsync_rank_received_bytes_total", "other"] == 2 * 2 * 24
    assert ("weightsync_rank_received_bytes_total", "0") not in got
    assert ("weightsync_rank_received_bytes_total", "70") not in got
    place = "engine0/dp0/pp0/tp1/ep0"
    assert got["weightsync_worker_received_bytes_total", place] == 2 * 2 * 24
    assert got["weightsync_ranks",] == 2
    assert got["weightsync_write_bytes_per_second",] > 0
    assert got["weightsync_push_paused_seconds_count",] == 2
    for phase in ("pause", "begin", "write", "commit", "resume"):
        assert got["weightsync_phase_seconds_count", phase] == 2, phase
    for phase in ("attach", "layout", "connect"):
        assert got["weightsync_phase_seconds_count", phase] == 1, phase
    assert got["weightsync_staleness_seconds",] < 5


async def test_seconds_of_a_pause_count_while_it_lasts_and_name_who_paused(agent, trainer):
    assert (await scrape(agent))["weightsync_paused_seconds_total", "hand"] == 0
    await agent.post("/pause")
    await asyncio.sleep(0.05)
    during = (await scrape(agent))["weightsync_paused_seconds_total", "hand"]
    assert 0.05 <= during < 5
    await agent.post("/resume")
    after = await scrape(agent)
    assert after["weightsync_paused_seconds_total", "push"] == 0
    later = await scrape(agent)
    assert later == after | {
        key: later[key] for key in later if key[0].startswith("weightsync_staleness")
    }


async def test_a_torn_push_counts_as_torn_and_its_failed_phase_has_no_time(agent, engine, trainer):
    engine.client.fail["commit"] = VerifyError("other bytes")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await t.commit(1, expect=409)
    got = await scrape(agent)
    assert got["weightsync_state", "torn"] == 1
    assert got["weightsync_pushes_total", "torn"] == 1
    assert got["weightsync_errors_total", "verify_failed"] == 1
    assert got["weightsync_call_errors_total", "/commit_update", "verify_failed"] == 1
    assert ("weightsync_phase_seconds_count", "commit") not in got
    assert got["weightsync_phase_seconds_count", "write"] == 1
    assert got["weightsync_received_bytes_total",] == 0
    phases = (await agent.status())["last_push"]["phases"]
    assert [(p["phase"], p["ok"]) for p in phases] == [
        ("pause", True), ("begin", True), ("write", True), ("commit", False),
        ("abort", True), ("close", True),
    ]  # fmt: skip
    assert all(a["start_s"] <= b["start_s"] for a, b in itertools.pairwise(phases))


async def test_refused_calls_are_counted_and_unknown_paths_make_no_series(make_agent, engine):
    agent = await make_agent(engine.url, token="t0ken")
    await agent.refused("/resume", 422, "invalid_input", push_id="no spaces")
    await agent.refused("/begin_update", 409, "no_session", session="s", epoch=1, push_id="p",
                        version=1)  # fmt: skip
    for guess in ("/admin", "/etc"):
        assert (await agent.http.get(guess)).status_code == 404
    await agent.http.get("/status", headers={"Authorization": "Bearer wrong"})
    got = await scrape(agent)
    assert {key[1:]: n for key, n in got.items() if key[0] == "weightsync_call_errors_total"} == {
        ("/resume", "invalid_input"): 1,
        ("/begin_update", "no_session"): 1,
        ("other", "not_found"): 2,
        ("/status", "unauthorized"): 1,
    }


async def test_a_phase_that_an_engine_cut_off_by_going_away_does_not_run_for_ever(
    agent, engine, trainer
):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    assert (await agent.status())["last_push"]["phases"][-1]["seconds"] is None
    await engine.stop()
    last = (await agent.until("detached"))["last_push"]
    assert last["outcome"] == "engine_lost"
    assert [last["phases"][-1][key] for key in ("phase", "ok")] == ["write", False]
    assert last["phases"][-1]["seconds"] > 0


async def test_every_phase_is_one_log_line(agent, trainer, caplog):
    t = await trainer(agent).rendezvous()
    with caplog.at_level(logging.INFO, logger="weightsync_server.agent.pushes"):
        await t.push(3)
    lines = [r for r in caplog.records if getattr(r, "event", "") == "push"]
    assert [r.fields["phase"] for r in lines] == [
        "pause", "begin", "write", "commit", "done", "resume",
    ]  # fmt: skip
    write = lines[2]
    assert write.fields["nbytes"] == 24
    assert write.fields["seconds"] > 0
    assert write.getMessage().startswith("push phase=write outcome=ok version=3 push_id=p1 seconds")


async def test_a_push_that_outlives_its_agent_is_counted_by_the_next_one(
    make_agent, engine, trainer, tmp_path
):
    first = await make_agent(engine.url, journal=tmp_path / "journal")
    t = await trainer(first).rendezvous()
    await t.pause()
    await first.stop()
    t.agent = await make_agent(engine.url, wait="paused", journal=tmp_path / "journal")
    await t.push(1)
    got = await scrape(t.agent)
    assert got["weightsync_pushes_total", "committed"] == 1
    assert got["weightsync_phase_seconds_count", "commit"] == 1
    last = (await t.agent.status())["last_push"]
    assert (last["push_id"], last["version"], last["outcome"]) == ("p1", 1, "committed")
