"""A push, call by call: what each answers, repeats, refuses."""

from __future__ import annotations

import asyncio
import base64

import pytest

from weightsync.codec import pack, unpack
from weightsync.errors import IdentityError, RefusedError, VerifyError
from weightsync.layout import WorkerLayout
from weightsync.manifest import TensorSpec
from weightsync.protocol import PROTOCOL_VERSION
from weightsync.worker_messages import CommitBody, LayoutBody


async def test_a_push_goes_through_all_states(agent, engine, trainer):
    t = trainer(agent)
    offer = await t.init()
    assert (offer["session"], offer["epoch"], offer["version"]) == ("s1", 1, 0)
    worker = offer["workers"][0]
    assert (worker["direct"], worker["staged"], worker["nbytes"]) == (1, 1, 24)
    assert base64.b64decode(worker["metadata"]) == b"meta"
    assert unpack(worker["layout"], WorkerLayout).regions[0].name == "a"
    await t.connect()
    assert (await t.pause())["state"] == "paused"
    assert engine.client.paused
    assert (await t.begin(5))["state"] == "receiving"
    assert engine.client.workers[0].dirty
    assert await agent.ready_code() == 503
    committed = await t.commit(5)
    assert (committed["state"], committed["version"]) == ("paused", 5)
    assert {"digest", "install", "reset_prefix_cache", "commit"} <= set(committed["seconds"])
    assert engine.client.paused
    resumed = await t.resume()
    assert (resumed["state"], resumed["version"]) == ("ready", 5)
    assert not engine.client.paused
    assert engine.client.ops == [
        "close", "attach", "layout", "connect", "pause", "begin", "reset_prefix_cache",
        "commit", "resume",
    ]  # fmt: skip
    status = await agent.status()
    assert status["last_push"]["outcome"] == "committed"
    assert set(status["last_push"]["seconds"]) == {
        "pause", "begin", "write", "commit", "resume", "paused",
    }  # fmt: skip
    assert (status["version"], status["session"], status["epoch"]) == (5, "s1", 1)
    assert status["workers"][0]["version"] == 5


async def test_one_rendezvous_serves_many_pushes(agent, trainer):
    t = await trainer(agent).rendezvous()
    for version in (1, 2, 7):
        t.push_id = f"p{version}"
        assert (await t.push(version))["version"] == version


async def test_an_epoch_that_a_worker_ended_with_its_commit_is_over_for_the_next_push(
    agent, engine, trainer
):
    engine.client.workers[0].first_push = True
    t = await trainer(agent).rendezvous()
    await t.push(1)
    status = await agent.status()
    assert (status["state"], status["version"]) == ("ready", 1)
    assert (status["session"], status["connected"]) == (None, False)
    assert engine.client.ops[-2:] == ["close", "resume"]


async def test_the_prefix_cache_is_reset_before_the_commit_and_only_if_wanted(
    agent, engine, trainer
):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1, reset_prefix_cache=False)
    await t.commit(1)
    assert "reset_prefix_cache" not in engine.client.ops


async def test_the_prefix_cache_is_reset_while_the_writes_come_in(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    for _ in range(500):
        if "reset_prefix_cache" in engine.client.ops:
            break
        await asyncio.sleep(0.01)
    assert (await agent.status())["state"] == "receiving"
    await t.begin(1)  # a sign of life resets nothing again
    await t.commit(1)
    assert engine.client.ops.count("reset_prefix_cache") == 1


async def test_a_push_that_is_aborted_leaves_its_reset_behind(agent, engine, trainer):
    engine.client.hang.add("reset_prefix_cache")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await t.abort()
    t.push_id = "p2"
    engine.client.hang.clear()
    await t.rendezvous()
    assert (await t.push(2))["version"] == 2


async def test_a_reset_that_hangs_ends_with_the_commits_deadline(agent, engine, trainer):
    engine.client.hang.add("reset_prefix_cache")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    problem = await t.commit(1, expect=504, timeout_s=0.3)
    assert problem["code"] == "deadline_exceeded"
    assert (await agent.status())["state"] == "torn"


async def test_a_prefix_cache_that_will_not_reset_tears_the_engine(agent, engine, trainer):
    engine.client.fail["reset_returns_false"] = RuntimeError()
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    assert (await t.commit(1, expect=502))["code"] == "engine_error"
    assert (await agent.status())["state"] == "torn"
    assert engine.client.paused


async def test_every_repeat_gets_the_same_answer_and_no_second_effect(agent, engine, trainer):
    t = trainer(agent)
    calls = [
        t.init, t.connect, t.pause, lambda: t.begin(1), lambda: t.commit(1), t.resume
    ]  # fmt: skip
    for call in calls:
        first = await call()
        assert await call() == first
    ops = engine.client.ops
    assert len(ops) == len(set(ops)), ops
    # and long after
    assert (await t.commit(1))["state"] == "paused"
    assert (await t.pause())["state"] == "paused"
    assert not engine.client.paused


async def test_a_repeat_while_the_first_call_runs_waits_for_its_answer(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    first, second = await asyncio.gather(t.begin(1), t.begin(1))
    assert first == second
    assert engine.client.ops.count("begin") == 1


async def test_a_push_id_used_for_another_version_is_refused(agent, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await agent.refused("/begin_update", 422, "invalid_input", **t.step, version=2)


async def test_a_session_used_for_another_manifest_is_refused(agent, trainer):
    t = await trainer(agent).rendezvous()
    await agent.refused(
        "/init_transfer",
        422,
        "invalid_input",
        protocol_version=PROTOCOL_VERSION,
        session=t.session,
        manifest={"tensors": [{"name": "z", "dtype": "float32", "shape": [4]}]},
    )


async def test_a_packed_manifest_reaches_the_workers(agent, engine):
    spec = (TensorSpec("x", "bfloat16", (2, 3)), TensorSpec("y", "bfloat16", (2, 3), "x"))
    await agent.post(
        "/init_transfer",
        protocol_version=PROTOCOL_VERSION,
        session="s",
        manifest=pack(spec),
    )
    command = next(c for c in engine.client.workers[0].received if c.op == "layout")
    assert unpack(command.body, LayoutBody).manifest == spec


async def test_a_new_rendezvous_ends_the_old_epoch(agent, trainer):
    old = await trainer(agent).rendezvous()
    new = await trainer(agent, session="s2", push_id="p2").rendezvous()
    assert new.epoch == old.epoch + 1
    await old.pause()
    assert (await old.begin(1, expect=409))["code"] == "stale_epoch"
    await old.abort()
    assert (await old.connect(expect=409))["code"] == "stale_epoch"
    await new.push(1)


async def test_a_push_without_rendezvous_is_refused(agent, trainer):
    t = trainer(agent)
    await t.pause()
    assert (await t.begin(1, expect=409))["code"] == "no_session"


async def test_a_push_before_connect_is_refused(agent, trainer):
    t = trainer(agent)
    await t.init()
    await t.pause()
    assert (await t.begin(1, expect=409))["code"] == "no_session"


async def test_a_push_that_did_not_pause_is_refused(agent, trainer):
    t = await trainer(agent).rendezvous()
    assert (await t.begin(1, expect=409))["code"] == "illegal_state"
    assert (await t.commit(1, expect=409))["code"] == "illegal_state"


async def test_versions_only_grow(agent, trainer):
    t = await trainer(agent).rendezvous()
    await t.push(3)
    t.push_id = "p2"
    await t.pause()
    refusal = await t.begin(3, expect=409)
    assert refusal["code"] == "stale_version"
    assert refusal["context"] == {"current": 3, "lowest": 4}


async def test_a_second_push_while_one_runs_is_refused(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    other = {"push_id": "p2"}
    for path, body in {
        "/pause": other,
        "/resume": other,
        "/abort_update": other | {"session": "s"},
        "/begin_update": t.step | other | {"version": 1},
        "/attach": {},
    }.items():
        await agent.refused(path, 409, "push_in_progress", **body)
    await t.begin(1)
    await agent.refused("/pause", 409, "push_in_progress", **other)
    await agent.refused("/resume", 409, "push_in_progress")
    checksums = await agent.http.get("/checksums")
    assert checksums.json()["code"] == "push_in_progress"
    await t.commit(1)
    await t.resume()


async def test_a_hand_paused_engine_refuses_pushes_until_resumed_by_hand(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    assert (await agent.post("/pause"))["state"] == "paused"
    assert (await agent.post("/pause"))["state"] == "paused"
    assert (await t.pause(expect=409))["code"] == "engine_paused"
    assert (await t.begin(1, expect=409))["code"] == "engine_paused"
    assert (await t.resume(expect=409))["code"] == "engine_paused"
    assert engine.client.ops.count("pause") == 1
    assert (await agent.post("/resume"))["state"] == "ready"
    # the refusal is not remembered as the push's answer
    assert (await t.pause())["state"] == "paused"


async def test_an_abort_before_begin_gives_the_engine_back(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    assert (await t.abort())["state"] == "ready"
    assert not engine.client.paused
    assert (await agent.status())["last_push"]["outcome"] == "aborted"


async def test_an_abort_after_begin_leaves_a_direct_engine_torn(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    assert (await t.abort())["state"] == "torn"
    assert engine.client.paused
    assert engine.client.ops[-2:] == ["abort", "close"]
    assert (await t.resume(expect=409))["code"] == "engine_torn"
    await agent.refused("/resume", 409, "engine_torn")
    assert await agent.ready_code() == 503
    assert (await t.commit(1, expect=409))["code"] == "engine_torn"


async def test_an_abort_after_begin_costs_nothing_where_no_live_byte_was_touched(
    agent, engine, trainer
):
    engine.client.workers[0].staged = True
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    assert (await t.abort())["state"] == "ready"
    assert not engine.client.paused
    # late writes of that push must not meet a later one: its epoch is over (WS-8)
    t.push_id = "p2"
    await t.pause()
    assert (await t.begin(1, expect=409))["code"] == "stale_epoch"


async def test_an_abort_of_an_unknown_push_changes_nothing(agent, trainer):
    assert (await trainer(agent).abort())["state"] == "ready"


async def test_wrong_bytes_tear_the_engine_and_a_whole_push_repairs_it(agent, engine, trainer):
    engine.client.fail["commit"] = VerifyError("digest of a differs", hint="h", tensor="a")
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(4)
    failed = await t.commit(4, expect=409)
    assert failed["code"] == "verify_failed"
    assert failed["context"]["tensor"] == "a"
    assert "engine0/dp0/pp0/tp0/ep0" in failed["detail"]
    assert await t.commit(4, expect=409) == failed
    assert (await agent.status())["state"] == "torn"

    engine.client.fail.clear()
    repair = trainer(agent, session="s2", push_id="p2")
    assert (await repair.init())["version"] == 3  # so that the interrupted one is the next
    await repair.connect()
    await repair.pause()
    assert (await repair.begin(3, expect=409))["code"] == "stale_version"
    repair.push_id = "p3"
    await agent.post("/abort_update", session="s2", push_id="p2")
    assert (await repair.push(4))["state"] == "ready"
    assert await agent.ready_code() == 200


async def test_a_commit_that_some_workers_made_is_torn(make_engine, make_agent, trainer):
    engine = await make_engine(2)
    agent = await make_agent(engine.url)
    client = engine.client
    client.fail["commit"] = VerifyError("differs", hint="h")
    client.fail_at = {str(client.workers[1].place)}
    for worker in client.workers:
        worker.staged = True  # nobody is dirty, still the two differ
    t = await trainer(agent).rendezvous()
    await t.pause()
    await t.begin(1)
    await t.commit(1, expect=409)
    assert [w.version for w in client.workers] == [1, 0]
    status = await agent.status()
    assert (status["state"], status["target"]) == ("torn", 2)
    assert client.paused


async def test_a_worker_that_fails_to_begin_gives_the_push_up(agent, engine, trainer):
    engine.client.fail["begin"] = IdentityError("a moved", hint="new rendezvous")
    t = await trainer(agent).rendezvous()
    await t.pause()
    failed = await t.begin(1, expect=409)
    assert failed["code"] == "identity_changed"
    assert (await agent.status())["state"] == "ready"  # nobody had marked itself dirty
    assert not engine.client.paused


async def test_refused_tensors_are_listed_and_the_engine_goes_on(make_engine, make_agent, trainer):
    engine = await make_engine(2)
    agent = await make_agent(engine.url)
    engine.client.fail["layout"] = RefusedError(
        "1 tensor", hint="h", refusals=[{"tensor": "a", "reason": "unproven"}]
    )
    t = trainer(agent)
    answer = await agent.refused(
        "/init_transfer", 422, "tensors_refused",
        protocol_version=PROTOCOL_VERSION, session="s", manifest=t.manifest(),
    )  # fmt: skip
    assert [r["tensor"] for r in answer["context"]["refusals"]] == ["a", "a"]
    assert len({r["place"] for r in answer["context"]["refusals"]}) == 2
    assert await agent.ready_code() == 200
    engine.client.fail.clear()
    await t.rendezvous()


async def test_each_worker_gets_its_own_writes_and_digests(make_engine, make_agent, trainer):
    engine = await make_engine(3)
    agent = await make_agent(engine.url)
    t = trainer(agent)
    await t.init()
    writes = [pack([(0, 8 * w, 8)]) for w in range(3)]
    await agent.post(
        "/connect", session="s1", epoch=1,
        ranks=[{"rank": 7, "metadata": "", "writes": [writes[0], "", writes[2]]}],
    )  # fmt: skip
    got = [w.connect.ranks for w in engine.client.workers]
    assert got[0][0].writes == [(0, 0, 8)]
    assert got[1] == []
    assert got[2][0].writes == [(0, 16, 8)]
    await t.pause()
    await t.begin(1)
    await agent.post(
        "/commit_update", **t.step, version=1,
        ranks=[{"rank": 7, "digests": [pack([b"0" * 16]), "", pack([b"2" * 16])]}],
    )  # fmt: skip
    place = str(engine.client.workers[2].place)
    command = engine.client.workers[2].received[-1]
    assert unpack(command.body_for(place), CommitBody).ranks[0].digests == [b"2" * 16]


@pytest.mark.parametrize(
    "ranks",
    [
        [{"rank": 0, "metadata": "", "writes": []}],
        [{"rank": 0, "metadata": "", "writes": ["", ""]}],
        [{"rank": 0, "metadata": "no base64!", "writes": [""]}],
        [{"rank": 0, "metadata": "", "writes": ["no packed thing"]}],
        [{"rank": 0, "metadata": "", "writes": [pack(["not", "writes"])]}],
        [{"rank": 0, "metadata": "", "writes": [""]}] * 2,
    ],
)
async def test_malformed_ranks_are_refused_before_a_worker_hears_of_them(
    agent, engine, trainer, ranks
):
    t = trainer(agent)
    await t.init()
    await agent.refused("/connect", 422, "invalid_input", session="s1", epoch=1, ranks=ranks)
    assert "connect" not in engine.client.ops


async def test_checksums_name_the_place_when_there_is_more_than_one(make_engine, make_agent):
    one = await make_agent((await make_engine(1)).url)
    two = await make_agent((await make_engine(2)).url)
    assert list((await one.http.get("/checksums")).json()["sha256"]) == ["a"]
    assert sorted((await two.http.get("/checksums")).json()["sha256"]) == [
        "engine0/dp0/pp0/tp0/ep0/a",
        "engine0/dp0/pp0/tp1/ep0/a",
    ]
