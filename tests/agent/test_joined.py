"""Pause and begin in one call, commit and resume in another: what each does when a part fails."""

from __future__ import annotations

import pytest

from weightsync.errors import EngineError, IdentityError

PAUSE = {"pause": "keep"}
RESUME = {"resume": True}


async def test_two_calls_make_a_push(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    begun = await t.begin(1, **PAUSE)
    assert begun["state"] == "receiving"
    assert {"pause", "begin"} <= begun["seconds"].keys()
    spans = {s["name"]: s for s in begun["spans"] if not s["place"]}
    assert spans["pause"]["start_s"] < spans["begin"]["start_s"]
    done = await t.commit(1, **RESUME)
    assert (done["state"], done["version"]) == ("ready", 1)
    assert {"commit", "resume", "digest"} <= done["seconds"].keys()
    assert engine.client.ops[-5:] == ["pause", "begin", "reset_prefix_cache", "commit", "resume"]


async def test_their_repeats_have_no_second_effect(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.begin(1, **PAUSE)
    assert (await t.begin(1, **PAUSE))["state"] == "receiving"
    assert (await t.begin(1))["state"] == "receiving", "as a heartbeat says it"
    await t.commit(1, **RESUME)
    assert (await t.commit(1, **RESUME))["state"] == "ready"
    assert engine.client.ops.count("pause") == engine.client.ops.count("resume") == 1
    assert (await t.begin(1, **PAUSE))["state"] == "receiving", "what was, and is no news"
    assert not engine.client.paused


async def test_what_is_refused_of_the_pause_changes_nothing(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await agent.post("/pause")
    refused = await t.begin(1, expect=409, **PAUSE)
    assert (refused["code"], refused["context"]["step"]) == ("engine_paused", "pause")
    assert (await agent.status())["pause_owner"] is None


async def test_what_is_refused_of_the_begin_pauses_nothing(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.push(5)
    engine.client.calls.clear()
    t.push_id = "p2"
    refused = await t.begin(5, expect=409, **PAUSE)
    assert (refused["code"], refused["context"]["step"]) == ("stale_version", "begin")
    t.epoch += 1
    assert (await t.begin(6, expect=409, **PAUSE))["code"] == "no_session"
    assert "pause" not in engine.client.ops
    assert (await agent.status())["state"] == "ready"


async def test_a_pause_that_fails_is_undone_and_may_be_tried_again(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    engine.client.fail["pause"] = RuntimeError("no")
    failed = await t.begin(1, expect=502, **PAUSE)
    assert failed["context"]["step"] == "pause"
    assert (await agent.status())["state"] == "ready"
    assert "begin" not in engine.client.ops
    engine.client.fail.clear()
    assert (await t.begin(1, **PAUSE))["state"] == "receiving"


async def test_a_begin_that_fails_after_its_pause_is_undone_and_remembered(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    engine.client.fail["begin"] = IdentityError("it moved", hint="rendezvous")
    failed = await t.begin(1, expect=409, **PAUSE)
    assert (failed["code"], failed["context"]["step"]) == ("identity_changed", "begin")
    assert not engine.client.paused
    assert (await agent.status())["state"] == "ready"
    engine.client.fail.clear()
    assert (await t.begin(1, expect=409, **PAUSE))["code"] == "identity_changed"
    assert not engine.client.paused, "a repeat of what failed must not pause again"


async def test_a_torn_engine_is_not_taken_by_the_repeat_of_a_begin(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.begin(1, **PAUSE)
    await t.abort()
    await t.begin(1, **PAUSE)
    status = await agent.status()
    assert (status["state"], status["pause_owner"]) == ("torn", None)


async def test_a_resume_that_fails_leaves_a_committed_push_to_be_resumed(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.begin(1, **PAUSE)
    engine.client.fail["resume"] = RuntimeError("not now")
    done = await t.commit(1, **RESUME)
    assert (done["state"], done["version"]) == ("paused", 1)
    engine.client.fail.clear()
    assert (await t.resume())["state"] == "ready"


async def test_a_commit_that_fails_resumes_nothing(agent, engine, trainer):
    t = await trainer(agent).rendezvous()
    await t.begin(1, **PAUSE)
    engine.client.fail["commit"] = EngineError("no", hint="look")
    await t.commit(1, expect=502, **RESUME)
    assert (await agent.status())["state"] == "torn"
    assert engine.client.paused


@pytest.mark.parametrize("call", ["begin", "commit"])
async def test_a_push_that_others_hold_off_resumes_and_pauses_nothing(agent, engine, trainer, call):
    t = await trainer(agent).rendezvous()
    await t.begin(1, **PAUSE)
    other = trainer(agent, t.session, "p2")
    other.epoch, other.workers = t.epoch, t.workers
    joined = {"begin": (other.begin, PAUSE), "commit": (other.commit, RESUME)}
    ask, more = joined[call]
    assert (await ask(2, expect=409, **more))["code"] == "push_in_progress"
    assert (await t.commit(1, **RESUME))["state"] == "ready"


@pytest.fixture
async def shadowed(agent, trainer):
    """A push in shadow mode that is written and checked."""
    t = trainer(agent, session="s-shadow")
    await t.init(mode="shadow")
    await t.connect()
    await t.begin(1, mode="shadow")
    ranks = t.ranks("digests", [b"d" * 16, b"e" * 16])
    await agent.post("/prepare_commit", **t.step, version=1, ranks=ranks)
    return t


async def test_a_shadow_is_paused_for_committed_and_resumed_in_one_call(agent, engine, shadowed):
    done = await shadowed.commit(1, ranks=[], **PAUSE, **RESUME)
    assert (done["state"], done["version"]) == ("ready", 1)
    assert {"pause", "commit", "resume", "install"} <= done["seconds"].keys()
    assert engine.client.ops[-4:] == ["pause", "reset_prefix_cache", "commit", "resume"]
    again = await shadowed.commit(1, ranks=[], **PAUSE, **RESUME)
    assert again["state"] == "ready"
    assert engine.client.ops.count("pause") == 1


async def test_what_is_refused_of_a_shadows_commit_pauses_nothing(agent, engine, shadowed):
    refused = await shadowed.commit(2, expect=409, ranks=[], **PAUSE, **RESUME)
    assert refused["context"]["step"] == "commit"
    assert "pause" not in engine.client.ops
    assert (await agent.status())["state"] == "shadowing"


async def test_a_pause_that_fails_leaves_a_shadows_engine_as_it_was(agent, engine, shadowed):
    engine.client.fail["pause"] = RuntimeError("no")
    failed = await shadowed.commit(1, expect=502, ranks=[], **PAUSE, **RESUME)
    assert failed["context"]["step"] == "pause"
    assert "commit" not in engine.client.ops
    status = await agent.status()
    assert (status["state"], status["version"]) == ("ready", 0)


async def test_a_commit_after_a_pause_of_its_own_call_does_not_pause_again(agent, engine, shadowed):
    await shadowed.pause()
    done = await shadowed.commit(1, ranks=[], **PAUSE, **RESUME)
    assert done["state"] == "ready"
    assert engine.client.ops.count("pause") == 1


async def test_a_shadows_commit_that_failed_is_remembered_and_pauses_no_more(
    agent, engine, shadowed
):
    engine.client.fail["commit"] = IdentityError("it moved", hint="rendezvous")
    failed = await shadowed.commit(1, expect=409, ranks=[], **PAUSE, **RESUME)
    assert (failed["code"], failed["context"]["step"]) == ("identity_changed", "commit")
    assert (await agent.status())["state"] == "ready"
    engine.client.fail.clear()
    again = await shadowed.commit(1, expect=409, ranks=[], **PAUSE, **RESUME)
    assert again["code"] == "identity_changed"
    assert not engine.client.paused
