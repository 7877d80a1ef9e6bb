"""POST /verify: who may ask when, and what all workers say together."""

from __future__ import annotations

from weightsync.codec import pack, unpack
from weightsync.worker_messages import VerifyBody


def asked(t, epoch: int | None = None):
    digests = pack([b"d" * 16, b"e" * 16])
    return {
        "session": t.session,
        "epoch": t.epoch if epoch is None else epoch,
        "ranks": [{"rank": 0, "digests": [digests] * t.workers}],
    }


async def test_differences_come_with_their_worker_and_nothing_changes(
    make_engine, make_agent, trainer
):
    engine = await make_engine(2)
    agent = await make_agent(engine.url)
    t = await trainer(agent).rendezvous()
    before = await agent.status()
    answer = await agent.post("/verify", **asked(t))
    (second,) = answer["differs"]
    assert (answer["version"], answer["kernel_tensors"]) == (0, 4)
    assert second == {
        "place": str(engine.client.workers[1].place), "tensor": "b", "what": "other bytes",
    }  # fmt: skip
    command = engine.client.workers[0].received[-1]
    body = unpack(command.body_for(str(engine.client.workers[0].place)), VerifyBody)
    assert body.ranks[0].digests == [b"d" * 16, b"e" * 16]
    after = await agent.status()
    assert {k: after[k] for k in before if k != "uptime_s"} == {
        k: before[k] for k in before if k != "uptime_s"
    }


async def test_verify_needs_the_connected_rendezvous_and_no_push(agent, trainer):
    t = trainer(agent)
    await agent.refused("/verify", 409, "no_session", **asked(t, epoch=1))
    await t.init()
    await agent.refused("/verify", 409, "no_session", **asked(t))
    await t.connect()
    await agent.refused("/verify", 422, "invalid_input", **{**asked(t), "ranks": [
        {"rank": 0, "digests": []}]})  # fmt: skip
    await t.pause()
    await agent.post("/verify", **asked(t))  # the engine is whole until the push begins
    await t.begin(1)
    await agent.refused("/verify", 409, "push_in_progress", **asked(t))
    await t.commit(1)
    await t.resume()
    await trainer(agent, "s2").init()
    await agent.refused("/verify", 409, "stale_epoch", **asked(t, epoch=1))
