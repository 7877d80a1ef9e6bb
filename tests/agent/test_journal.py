"""An agent that starts again goes on where the one before it was, and says so if it cannot."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest
import pytest_asyncio

from weightsync.errors import InputError, VerifyError
from weightsync_server.agent.journal import Journal, Record, default_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "the.journal"


@pytest_asyncio.fixture
async def start(make_agent, engine, path):
    """Starts the agent, or ends it and starts the next one."""
    running = []

    async def start(*, wait="ready", **options):
        for agent in running:
            await agent.stop()
        running[:] = [await make_agent(engine.url, wait=wait, journal=path, **options)]
        return running[0]

    return start


@pytest.fixture
def full_disk(monkeypatch):
    """While it is set there is room on the disk for a few bytes more, and for nothing then."""
    state = {"full": False, "room": 7}
    write = os.write

    def maybe(fd, data):
        if not state["full"]:
            return write(fd, data)
        room, state["room"] = state["room"], 0
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:room])

    monkeypatch.setattr(os, "write", maybe)
    return state


# ------------------------------------------------------------------ restarts


async def test_a_push_goes_on_through_a_restart_of_the_agent_before_begin(start, engine, trainer):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    t.agent = await start(wait="paused")
    status = await t.agent.status()
    assert (status["pause_owner"], status["session"], status["epoch"]) == ("p1", "s1", 1)
    assert status["workers"][0]["kernel_tensors"] == 3
    assert (await t.pause())["state"] == "paused"
    await t.begin(1)
    await t.commit(1)
    assert (await t.resume())["state"] == "ready"
    assert engine.client.ops.count("pause") == 2, "whether it stands still is not taken on trust"


async def test_pause_and_begin_in_one_call_go_on_through_a_restart_in_between(
    start, engine, trainer
):
    t = await trainer(await start()).rendezvous()
    await t.pause()  # as far as the call came
    t.agent = await start(wait="paused")
    assert (await t.begin(1, pause="keep"))["state"] == "receiving"
    assert engine.client.ops.count("pause") == 2, "whether it stands still is not taken on trust"
    assert engine.client.ops.count("begin") == 1
    assert (await t.commit(1, resume=True))["state"] == "ready"


async def test_commit_and_resume_in_one_call_go_on_through_a_restart_in_between(
    start, engine, trainer
):
    t = await trainer(await start()).rendezvous()
    await t.begin(1, pause="keep")
    await t.commit(1)  # as far as the call came
    t.agent = await start(wait="paused")
    assert (await t.commit(1, resume=True))["state"] == "ready"
    assert engine.client.ops.count("commit") == 1


async def test_a_session_stays_its_trainers_through_a_restart(start, trainer):
    t = trainer(await start())
    t.agent.http.headers["X-Weightsync-Session-Secret"] = "mine"
    await t.rendezvous()
    t.agent = await start()
    await t.pause()
    assert (await t.begin(1, expect=403))["code"] == "forbidden"
    t.agent.http.headers["X-Weightsync-Session-Secret"] = "mine"
    assert (await t.begin(1))["state"] == "receiving"


async def test_the_pause_of_a_dead_push_is_ended_by_the_next_agent(start, engine, trainer):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    agent = await start(wait="paused", push_idle_timeout_s=0.3)
    assert (await agent.until("ready"))["version"] == 0
    assert not engine.client.paused


async def test_a_pause_by_hand_still_is_one_after_a_restart(start, engine):
    await (await start()).post("/pause")
    agent = await start(wait="paused", push_idle_timeout_s=0.3)
    assert (await agent.status())["pause_owner"] is None
    assert (await agent.post("/resume"))["state"] == "ready"


async def test_repeats_after_a_restart_get_the_answers_of_before(start, engine, trainer):
    t = await trainer(await start()).rendezvous()
    paused, begun, committed = await t.pause(), await t.begin(3), await t.commit(3)
    t.agent = await start(wait="paused")
    assert await t.commit(3) == committed
    resumed = await t.resume()
    t.agent = await start()
    ops = list(engine.client.ops)
    assert [await t.pause(), await t.begin(3), await t.commit(3)] == [paused, begun, committed]
    assert await t.resume() == resumed
    assert engine.client.ops == ops, "no second effect"
    await t.agent.refused("/begin_update", 422, "invalid_input", **t.step, version=4)
    status = await t.agent.status()
    assert (status["committed"], status["committed_by"]) == (3, "p1")


async def test_a_failed_commit_is_remembered_too(start, engine, trainer):
    engine.client.fail["commit"] = VerifyError("differs", hint="h")
    t = await trainer(await start()).rendezvous()
    await t.pause()
    await t.begin(3)
    failed = await t.commit(3, expect=409)
    t.agent = await start(wait="torn")
    assert await t.commit(3, expect=409) == failed


async def test_a_commit_that_the_dead_agent_never_heard_of_is_answered_all_the_same(
    start, engine, trainer
):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    await t.begin(3)
    await t.agent.stop()
    worker = engine.client.workers[0]
    worker.version, worker.dirty = 3, False
    t.agent = await start(wait="paused")
    assert (await t.commit(3))["version"] == 3
    assert "commit" not in engine.client.ops
    assert (await t.resume())["state"] == "ready"


async def test_an_engine_that_was_being_written_to_is_torn_for_the_next_agent(
    start, engine, trainer
):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    await t.begin(9)
    agent = await start(wait="torn")
    status = await agent.status()
    assert (status["target"], status["lowest"], status["session"]) == (9, 9, None)
    assert engine.client.paused
    await agent.refused("/resume", 409, "engine_torn")
    repair = await trainer(agent, "s2", "p2").rendezvous()
    assert repair.epoch == 2, "epochs grow across restarts, too"
    assert (await repair.push(9))["state"] == "ready"


async def test_a_push_in_shadow_mode_is_given_up_by_the_next_agent_and_the_engine_serves_on(
    start, engine, trainer
):
    t = trainer(await start())
    await t.init(mode="shadow")
    await t.connect()
    await t.begin(1, mode="shadow")
    t.agent = await start()
    status = await t.agent.status()
    assert (status["version"], status["session"], status["pause_owner"]) == (0, None, None)
    assert (await t.commit(1, expect=409))["code"] == "stale_epoch"
    assert not {"pause", "resume"} & set(engine.client.ops)


async def test_the_way_back_outlives_the_agent(start, trainer):
    t = trainer(await start())
    await t.init(mode="shadow")
    await t.connect()
    await t.begin(1, mode="shadow")
    await t.pause()
    await t.commit(1)
    await t.resume()
    t.agent = await start()
    assert (await t.agent.post("/rollback"))["version"] == 0
    t.agent = await start()
    assert (await t.agent.status())["rolled_back_from"] == 1
    t.session, t.push_id = "s2", "p2"
    await t.init(mode="shadow")
    await t.connect()
    assert (await t.begin(1, mode="shadow", expect=409))["code"] == "stale_version"


async def test_versions_grow_though_agent_and_engine_start_anew(start, engine, trainer):
    t = await trainer(await start()).rendezvous()
    await t.push(7)
    await engine.restart()
    agent = await start()
    status = await agent.status()
    assert (status["version"], status["committed"], status["lowest"]) == (0, 7, 7)
    t = trainer(agent, "s2", "p2")
    assert (await t.init())["version"] == 7
    await t.connect()
    await t.pause()
    refused = await t.begin(6, expect=409)
    assert refused["code"] == "stale_version"
    assert "7 was pushed here" in refused["detail"]
    assert "--journal" in refused["hint"]
    # what it had it may be given again, nothing below
    assert (await t.begin(7))["state"] == "receiving"


# ------------------------------------------------------------------ disks


async def test_a_full_disk_refuses_a_push_before_the_engine_is_paused(
    start, engine, trainer, full_disk
):
    t = await trainer(await start()).rendezvous()
    full_disk["full"] = True
    refused = await t.pause(expect=503)
    assert refused["code"] == "journal_failed"
    assert "No space left" in refused["detail"]
    assert "pause" not in engine.client.ops
    status = await t.agent.status()
    assert "No space left" in status["journal"]["trouble"]
    assert status["last_errors"][-1]["code"] == "journal_failed"
    assert await t.agent.ready_code() == 200
    # by hand an engine can always be stopped
    await t.agent.post("/pause")
    await t.agent.post("/resume")
    full_disk["full"] = False
    await t.push(1)
    assert (await t.agent.status())["journal"]["trouble"] == ""


async def test_a_journal_that_fails_is_a_metric_and_is_tried_again_by_itself(
    start, trainer, full_disk, monkeypatch
):
    monkeypatch.setattr("weightsync_server.agent.watch._JOURNAL_RETRY_S", 0.02)
    t = await trainer(await start()).rendezvous()

    async def writable() -> bool:
        return "weightsync_journal_writable 1.0" in (await t.agent.http.get("/metrics")).text

    assert await writable()
    full_disk["full"] = True
    await t.pause(expect=503)
    assert not await writable()
    full_disk["full"] = False
    async with asyncio.timeout(5):
        while not await writable():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert (await t.agent.status())["journal"]["trouble"] == ""


async def test_a_disk_that_fills_up_after_the_pause_refuses_begin_before_a_byte_moves(
    start, engine, trainer, full_disk
):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    full_disk["full"] = True
    assert (await t.begin(1, expect=503))["code"] == "journal_failed"
    assert "begin" not in engine.client.ops
    assert (await t.abort())["state"] == "ready"


async def test_a_disk_that_fills_up_in_the_push_does_not_take_the_version_back(
    start, engine, trainer, full_disk
):
    t = await trainer(await start()).rendezvous()
    await t.pause()
    await t.begin(1)
    full_disk["full"] = True
    assert (await t.commit(1))["version"] == 1
    assert (await t.resume())["state"] == "ready"
    full_disk["full"] = False
    agent = await start()  # the journal tells of a push under way, the workers that it is whole
    assert (await agent.status())["committed"] == 1


async def test_a_damaged_journal_is_set_aside_and_told(start, engine, path, trainer):
    await (await trainer(await start()).rendezvous()).push(2)
    agent = await start()
    await agent.stop()
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    agent = await start()
    status = await agent.status()
    assert (status["state"], status["version"], status["committed"]) == ("ready", 2, 2)
    assert "is damaged" in status["last_errors"][0]["detail"]
    assert (path.parent / "the.journal.damaged").read_bytes()[:-1] == raw[:-1]
    await (await trainer(agent, "s2", "p2").rendezvous()).push(3)


async def test_a_journal_of_another_format_is_set_aside_and_told(start, path):
    path.write_bytes(b"weightsync-journal-1 00000000\n{}")
    status = await (await start()).status()
    told = status["last_errors"][0]["detail"]
    assert "it begins with b'weightsync-journal-1 00000000', not with" in told
    assert (path.parent / "the.journal.damaged").exists()


async def test_a_folder_that_cannot_be_made_refuses_pushes(make_agent, engine, tmp_path, trainer):
    (tmp_path / "file").write_text("in the way")
    agent = await make_agent(engine.url, journal=tmp_path / "file" / "agent.journal")
    assert (await agent.status())["journal"]["trouble"]
    t = trainer(agent)
    await agent.refused(
        "/init_transfer", 503, "journal_failed",
        protocol_version=1, session="s", manifest=t.manifest(),
    )  # fmt: skip


async def test_a_write_that_was_cut_short_leaves_the_old_record(path):
    journal = Journal(path, lambda error: pytest.fail(str(error)))
    journal.open()
    await journal.save(Record(instances={"a": "1"}))
    journal.close()
    path.with_name("the.journal.new").write_bytes(b"half a rec")
    again = Journal(path, lambda error: pytest.fail(str(error)))
    again.open()
    assert again.record == Record(instances={"a": "1"})
    again.close()


def test_a_journal_has_one_agent(path):
    first = Journal(path, pytest.fail)
    first.open()
    with pytest.raises(InputError, match="another agent has the journal"):
        Journal(path, pytest.fail).open()
    first.close()
    second = Journal(path, pytest.fail)
    second.open()
    second.close()


def test_each_set_of_engines_has_a_journal_of_its_own(tmp_path):
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    one = default_path(["http://a:1", "http://b:1"], environ)
    assert one.parent == tmp_path / "weightsync"
    assert default_path(["http://b:1", "http://a:1"], environ) == one
    assert default_path(["http://a:1"], environ) != one


# ------------------------------------------------------------------ syncing


async def test_with_require_push_the_gate_opens_with_the_first_push_of_each_engine_process(
    start, engine, trainer
):
    agent = await start(require_push=True)
    gate = await agent.http.get("/readyz")
    assert (gate.status_code, gate.json()["code"]) == (503, "engine_syncing")
    assert (await agent.status())["syncing"]
    await (await trainer(agent).rendezvous()).push(1)
    assert await agent.ready_code() == 200
    await engine.restart()
    await agent.until("detached")
    await agent.until("ready")
    assert await agent.ready_code() == 503
    await (await trainer(agent, "s2", "p2").rendezvous()).push(1)
    assert await agent.ready_code() == 200
    assert not (await agent.status())["syncing"]
