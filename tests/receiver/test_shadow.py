"""Pushes through a shadow: the engine serves meanwhile, and the version before can come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.receiver.mixed import make, serves, weights
from tests.receiver.toys import Bag, ToyAdapter, Trainer, new_pair, random_like, state_of
from weightsync.errors import (
    DeadlineError,
    HeadroomError,
    NoPreviousError,
    StaleVersionError,
    VerifyError,
)
from weightsync.slab import ALIGN_NBYTES
from weightsync.transport.inmemory import Faults
from weightsync.worker_messages import (
    AbortBody,
    AttachBody,
    RankDigestsBody,
    RollbackBody,
    VerifyBody,
)
from weightsync_server.receiver import shadow
from weightsync_server.receiver.exchange import Exchange


@pytest.fixture
def pair(engine):
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    trainer.rendezvous(weights())
    return receiver, trainer


def push(trainer: Trainer, seed: int, version: int) -> None:
    digests = trainer.fill(weights(seed))
    trainer.begin(version, live=False)
    trainer.send(version)
    trainer.prepare(version, digests)
    trainer.commit(version, [])


# ------------------------------------------------------------------ pushes that work


def test_a_push_in_shadow_leaves_what_a_fresh_load_would(engine, pair):
    receiver, trainer = pair
    for version in (1, 2, 5):
        push(trainer, version, version)
        assert serves(engine, weights(version))
        assert (receiver.version, receiver.dirty) == (version, False)


def test_what_could_be_written_directly_lands_in_the_shadow_and_nothing_in_live_memory(engine):
    _, trainer = new_pair(engine)
    trainer.mode = "shadow"
    regions = trainer.rendezvous(weights()).layout.regions
    assert {r.name: r.mode for r in regions} == {
        name: "staged" if name == "packed.weight" else "shadow" for name in
        ("embed.weight", "qkv.weight", "qkv.bias", "packed.weight", "copied.weight", "norm.weight")
    }  # fmt: skip
    live = {t.data_ptr() for t in engine.live.parameters()}
    assert not live & {r.addr for r in regions}


def test_until_the_commit_the_engine_serves_what_it_served(engine, pair):
    receiver, trainer = pair
    before = state_of(engine.live)
    digests = trainer.fill(weights(1))
    trainer.begin(1, live=False)
    assert not receiver.dirty
    trainer.send(1)
    trainer.prepare(1, digests)
    assert state_of(engine.live) == before
    assert not receiver.dirty
    trainer.commit(1, [])
    assert serves(engine, weights(1))


def test_the_order_of_a_direct_push_works_too(engine, pair):
    _, trainer = pair
    trainer.push(weights(3), 3)
    assert serves(engine, weights(3))


def test_a_new_rendezvous_uses_the_shadow_again_and_keeps_what_is_in_it(engine, pair):
    receiver, trainer = pair
    push(trainer, 1, 1)
    memory = receiver._history._shadow
    assert trainer.rendezvous(weights()).rollback_to == 0
    assert receiver._history._shadow is memory
    trainer.mode = "direct"
    trainer.rendezvous(weights())
    assert receiver.rollback(RollbackBody(0)).version == 0
    assert serves(engine, weights(0))
    trainer.push(weights(4), 4)
    assert receiver._history._shadow is None
    assert serves(engine, weights(4))


def test_the_first_push_without_a_checkpoint_works_and_cannot_be_taken_back():
    engine = make(None)
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    trainer.rendezvous(weights(1))
    push(trainer, 1, 1)
    assert serves(engine, weights(1))
    with pytest.raises(NoPreviousError):
        receiver.rollback(RollbackBody(0))
    trainer.rendezvous(weights(2))
    push(trainer, 2, 2)
    assert serves(engine, weights(2))
    receiver.rollback(RollbackBody(1))
    assert serves(engine, weights(1))


def test_verify_looks_at_what_serves_and_not_at_the_shadow(engine, pair):
    receiver, trainer = pair
    push(trainer, 1, 1)

    def differs(seed: int) -> set[str]:
        ranks = [RankDigestsBody(0, trainer.fill(weights(seed)))]
        trainer.send(0)  # what is staged; the shadow gets it too
        return {name for name, _ in receiver.verify(VerifyBody(trainer.epoch, ranks)).differs}

    assert differs(1) == set()
    assert "norm.weight" in differs(2)


# ------------------------------------------------------------------ aborts


def test_an_abort_before_the_commit_costs_nothing(engine, pair):
    receiver, trainer = pair
    before = state_of(engine.live)
    digests = trainer.fill(weights(1))
    trainer.begin(1, live=False)
    trainer.send(1)
    trainer.prepare(1, digests)
    answer = receiver.abort(AbortBody("push-1"))
    assert (answer.dirty, answer.version, answer.rollback_to) == (False, 0, None)
    assert state_of(engine.live) == before
    trainer.rendezvous(weights())
    push(trainer, 2, 2)
    assert serves(engine, weights(2))


def test_bytes_that_are_wrong_are_found_before_the_pause(engine, pair):
    receiver, trainer = pair
    trainer.fabric.inject(trainer.peer, Faults(torn_nbytes=100))
    digests = trainer.fill(weights(1))
    trainer.begin(1, live=False)
    trainer.send(1)
    with pytest.raises(VerifyError, match="differ from what it sent"):
        trainer.prepare(1, digests)
    with pytest.raises(VerifyError):  # and again, if somebody tries to commit all the same
        trainer.commit(1, digests)
    assert not receiver.dirty
    assert serves(engine, weights())


def test_a_writer_that_does_not_report_is_missed_before_the_pause(pair):
    receiver, trainer = pair
    digests = trainer.fill(weights(1))
    trainer.begin(1, live=False)
    with pytest.raises(DeadlineError, match="ranks \\[0\\] did not report version 1"):
        trainer.prepare(1, digests, timeout_s=0.05)
    assert not receiver.dirty


# ------------------------------------------------------------------ rollback


def test_a_rollback_serves_the_version_before_and_the_next_push_is_newer_than_both(engine, pair):
    receiver, trainer = pair
    push(trainer, 1, 1)
    push(trainer, 2, 2)
    for _ in range(2):  # a repeat gets the same answer
        answer = receiver.rollback(RollbackBody(1))
        assert (answer.version, answer.rolled_back_from) == (1, 2)
    assert serves(engine, weights(1))
    assert (receiver.version, receiver.dirty) == (1, False)
    with pytest.raises(StaleVersionError, match="not newer than 2"):
        trainer.begin(2, live=False)
    push(trainer, 3, 3)
    assert serves(engine, weights(3))
    receiver.rollback(RollbackBody(1))
    assert serves(engine, weights(1))


def test_one_step_back_is_all_there_is(engine, pair):
    receiver, trainer = pair
    with pytest.raises(NoPreviousError, match="version 0 is not kept"):
        receiver.rollback(RollbackBody(0))
    push(trainer, 1, 1)
    push(trainer, 2, 2)
    with pytest.raises(NoPreviousError, match=r"version 0 is not kept .*: version 1 is"):
        receiver.rollback(RollbackBody(0))
    receiver.rollback(RollbackBody(1))
    with pytest.raises(NoPreviousError):
        receiver.rollback(RollbackBody(0))
    assert not receiver.dirty
    assert serves(engine, weights(1))


def test_a_push_that_begins_gives_up_the_version_before(engine, pair):
    receiver, trainer = pair
    push(trainer, 1, 1)
    assert receiver.describe().rollback_to == 0
    trainer.begin(2, live=False)
    assert receiver.describe().rollback_to is None
    receiver.abort(AbortBody("push-2"))
    with pytest.raises(NoPreviousError):
        receiver.rollback(RollbackBody(0))
    assert serves(engine, weights(1))


@pytest.mark.parametrize("fails_at", range(12))
def test_a_commit_that_fails_half_way_is_torn_and_a_rollback_mends_it(
    engine, pair, monkeypatch, fails_at
):
    receiver, trainer = pair
    push(trainer, 1, 1)
    digests = trainer.fill(weights(2))
    trainer.begin(2, live=False)
    trainer.send(2)
    trainer.prepare(2, digests)
    copies = []

    class Breaking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.copy_:
                copies.append(args[0])
                if len(copies) > fails_at:
                    raise RuntimeError("out of luck")
            return func(*args, **(kwargs or {}))

    with Breaking(), pytest.raises(Exception, match="out of luck"):
        trainer.commit(2, [])
    assert receiver.dirty
    assert receiver.abort(AbortBody("push-2")).rollback_to == 1
    answer = receiver.rollback(RollbackBody(1))
    assert (answer.version, answer.rolled_back_from, receiver.dirty) == (1, 2, False)
    assert serves(engine, weights(1))
    trainer.rendezvous(weights())
    push(trainer, 3, 3)
    assert serves(engine, weights(3))


def test_objects_that_post_processing_makes_come_back_with_their_weights(tmp_path):
    def finish(module: torch.nn.Module) -> None:
        if hasattr(module, "weight"):
            packed = module.weight.data.t().contiguous()
            module.kernel = lambda x, packed=packed: x @ packed
            module.scale = float(packed.max())
            module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def read_back(module, name, columns):
        return module.kernel(torch.eye(8)[columns]).t()

    def given(seed: int) -> dict[str, torch.Tensor]:
        return {"weight": random_like(torch.float32, 8, 8, seed=seed)}

    engine = ToyAdapter(
        lambda: Bag(weight=torch.empty(8, 8)), start=given(0), finish=finish, folder=tmp_path,
        read_back=read_back,
    )  # fmt: skip
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    trainer.rendezvous(given(0))
    eye = torch.eye(8)
    for version in (1, 2):
        digests = trainer.fill(given(version))
        trainer.begin(version, live=False)
        trainer.send(version)
        trainer.prepare(version, digests)
        trainer.commit(version, [])
        assert torch.equal(engine.live.kernel(eye), given(version)["weight"].t())
    engine.live.requests = 7  # what the engine does meanwhile is its own
    receiver.rollback(RollbackBody(1))
    assert torch.equal(engine.live.kernel(eye), given(1)["weight"].t())
    assert engine.live.scale == float(given(1)["weight"].max())
    assert engine.live.requests == 7


# ------------------------------------------------------------------ memory


def test_a_shadow_that_does_not_fit_is_refused_with_the_bytes(engine, monkeypatch):
    monkeypatch.setattr(shadow, "free_nbytes", lambda _: 1000)
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    with pytest.raises(HeadroomError, match="and 1000 are free") as caught:
        trainer.rendezvous(weights())
    assert caught.value.context["free_nbytes"] == 1000
    assert caught.value.context["needed_nbytes"] > 1000
    assert receiver.describe().epoch == 0
    trainer.mode = "direct"
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    assert serves(engine, weights(1))


def test_attach_tells_what_a_whole_shadow_takes_and_then_what_is_held(engine):
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    (before,) = receiver.attach(AttachBody("windows")).headroom
    assert (before.kind, before.held_nbytes) == ("DRAM", 0)
    assert before.free_nbytes is not None
    trainer.rendezvous(weights())
    push(trainer, 1, 1)
    (after,) = receiver.attach(AttachBody("windows")).headroom
    assert after.needed_nbytes == before.needed_nbytes
    # no more than was told, but for the page that a slab is rounded to
    assert before.needed_nbytes - ALIGN_NBYTES <= after.held_nbytes <= before.needed_nbytes


def test_of_unproven_weights_all_count(engine):
    (known,) = new_pair(engine)[0].attach(AttachBody("windows")).headroom
    (guessed,) = new_pair(make(None))[0].attach(AttachBody("windows")).headroom
    nbytes = sum(t.nbytes for t in engine.new_twin().parameters())
    assert nbytes <= guessed.needed_nbytes <= known.needed_nbytes


@pytest.mark.parametrize("sizes", [[], [1], [3, 0, 17], [1 << 20, (1 << 20) + 1, 5 << 20]])
def test_an_exchange_is_one_and_its_undo_is_none(sizes):
    pairs = [tuple(torch.randint(0, 256, (n,), dtype=torch.uint8) for _ in range(2)) for n in sizes]
    before = [(a.clone(), b.clone()) for a, b in pairs]
    exchange = Exchange(pairs)
    assert exchange.nbytes == sum(sizes)

    def same(now, want) -> bool:
        return all(
            torch.equal(a, x) and torch.equal(b, y)
            for (a, b), (x, y) in zip(now, want, strict=True)
        )

    exchange.run()
    assert same(pairs, [(b, a) for a, b in before])
    exchange.undo()
    assert same(pairs, before)
    exchange.undo()
    assert same(pairs, before)


def test_attach_knows_that_a_rolled_back_engine_serves_its_checkpoint(tmp_path: Path):
    engine = make(tmp_path)
    receiver, trainer = new_pair(engine)
    trainer.mode = "shadow"
    trainer.rendezvous(weights())
    push(trainer, 1, 1)
    receiver.rollback(RollbackBody(0))
    assert receiver.attach(AttachBody("full")).refusals == []
