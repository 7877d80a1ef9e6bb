"""Torn, late, lost and mistimed: what can go wrong with a push."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.receiver.mixed import F32, serves, weights
from tests.receiver.toys import (
    Bag,
    ToyAdapter,
    manifest_of,
    new_pair,
    random_like,
    state_of,
)
from weightsync.errors import (
    DeadlineError,
    IdentityError,
    NoSessionError,
    PlanError,
    StaleEpochError,
    StaleVersionError,
    VerifyError,
)
from weightsync.transport.inmemory import Faults, InMemoryTransport
from weightsync.worker_messages import (
    AbortBody,
    AttachBody,
    BeginBody,
    ConnectBody,
    LayoutBody,
)

# ------------------------------------------------------------------ bytes that are not right


def staged_only(folder: Path) -> ToyAdapter:
    """An engine that repacks all that it has."""

    def finish(module: nn.Module) -> None:
        if hasattr(module, "weight"):
            module.weight = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)

    start = {"weight": random_like(F32, 8, 8)}
    return ToyAdapter(
        lambda: Bag(weight=torch.empty(8, 8)), start=start, finish=finish, folder=folder
    )


def test_a_torn_direct_write_fails_the_digest_and_leaves_the_worker_dirty(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    trainer.fabric.inject(trainer.peer, Faults(torn_nbytes=100))
    with pytest.raises(VerifyError, match="differ from what it sent"):
        trainer.push(weights(1), 1)
    assert (receiver.version, receiver.dirty) == (0, True)
    assert receiver.abort(AbortBody("push-1")).dirty


def test_a_torn_staged_write_fails_the_digest_and_costs_nothing(tmp_path):
    engine = staged_only(tmp_path)
    before = state_of(engine.live)
    receiver, trainer = new_pair(engine)
    trainer.rendezvous({"weight": random_like(F32, 8, 8)})
    trainer.fabric.inject(trainer.peer, Faults(torn_nbytes=100))
    with pytest.raises(VerifyError):
        trainer.push({"weight": random_like(F32, 8, 8, seed=1)}, 1)
    assert (receiver.version, receiver.dirty) == (0, False)
    assert state_of(engine.live) == before


def test_one_flipped_byte_is_found_and_its_tensor_named(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)
    engine.live.norm.weight.data.view(torch.uint8)[5] ^= 1
    with pytest.raises(VerifyError, match=r"of norm\.weight") as error:
        trainer.commit(1, digests)
    assert error.value.context["tensor"] == "norm.weight"
    assert receiver.dirty


def plain(folder: Path) -> ToyAdapter:
    """An engine that is written to in place, all of it."""
    start = {"weight": random_like(F32, 8, 8)}
    return ToyAdapter(lambda: Bag(weight=torch.empty(8, 8)), start=start, folder=folder)


@pytest.mark.parametrize("kind", [plain, staged_only], ids=["in place", "staged"])
def test_what_is_derived_is_renewed_once_a_commit_after_all_is_written(kind, tmp_path, monkeypatch):
    engine = kind(tmp_path)
    seen = []
    monkeypatch.setattr(engine, "refresh", lambda: seen.append(state_of(engine.live)))
    _, trainer = new_pair(engine)
    trainer.rendezvous({"weight": random_like(F32, 8, 8)})
    for version in (1, 2):
        trainer.push({"weight": random_like(F32, 8, 8, seed=version)}, version)
        assert seen.pop() == state_of(engine.live)
        assert not seen


def test_a_digest_that_differs_is_told_before_what_failed_beside_it(tmp_path, monkeypatch):
    engine = plain(tmp_path)

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "refresh", fail)
    receiver, trainer = new_pair(engine)
    trainer.rendezvous({"weight": random_like(F32, 8, 8)})
    with pytest.raises(ZeroDivisionError):
        trainer.push({"weight": random_like(F32, 8, 8, seed=1)}, 1)
    assert (receiver.version, receiver.dirty) == (0, True)
    receiver.abort(AbortBody("push-1"))
    trainer.rendezvous({"weight": random_like(F32, 8, 8)})
    trainer.fabric.inject(trainer.peer, Faults(torn_nbytes=100))
    with pytest.raises(VerifyError):
        trainer.push({"weight": random_like(F32, 8, 8, seed=2)}, 2)
    assert (receiver.version, receiver.dirty) == (0, True)


def test_missing_digests_are_no_proof(engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)
    with pytest.raises(VerifyError, match="sent 0 digests"):
        trainer.commit(1, [])
    with pytest.raises((VerifyError, DeadlineError)):
        trainer.commit(1, digests[:-1], timeout_s=0.05)


def test_a_dirty_worker_recovers_by_a_whole_push_of_the_same_version(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    trainer.fabric.inject(trainer.peer, Faults(torn_nbytes=100))
    with pytest.raises(VerifyError):
        trainer.push(weights(1), 1)
    receiver.abort(AbortBody("push-1"))
    assert receiver.dirty
    trainer.rendezvous(weights())
    trainer.push(weights(2), 1)
    assert (receiver.version, receiver.dirty) == (1, False)
    assert serves(engine, weights(2))


# ------------------------------------------------------------------ writers that are late or lost


def test_a_writer_that_never_reports_is_named_within_the_deadline(engine):
    receiver, trainer = new_pair(engine)
    trainer.rank = 3
    trainer.rendezvous(weights())
    trainer.fabric.inject(trainer.peer, Faults(lose_notification=True))
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)
    start = time.monotonic()
    with pytest.raises(DeadlineError, match=r"ranks \[3\] did not report version 1") as error:
        trainer.commit(1, digests, timeout_s=0.2)
    assert time.monotonic() - start < 2
    assert error.value.context["ranks"] == [3]
    assert receiver.dirty


def test_a_deadline_that_is_no_number_is_over_at_once(engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    with pytest.raises(DeadlineError):
        trainer.commit(1, digests, timeout_s=float("nan"))


def test_a_second_try_of_a_version_needs_a_new_epoch(engine):
    """Messages of the first try are out: they could not be told from those of the second."""
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.transport.post(trainer.write, b"ws:1:1:0")
    trainer.transport.wait([trainer.write], timeout_s=1)
    digests[0] = bytes(16)
    with pytest.raises(VerifyError):
        trainer.commit(1, digests)
    with pytest.raises(StaleEpochError, match="was begun in epoch 1 before"):
        trainer.begin(1, push_id="second try")
    trainer.begin(2)


def test_a_late_message_after_an_abort_never_counts(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    old, old_write = trainer.transport, trainer.write
    trainer.fabric.inject(trainer.peer, Faults(delay_s=0.05))
    trainer.fill(weights(1))
    trainer.begin(1)
    old.post(old_write, b"ws:1:1:0")
    receiver.abort(AbortBody("push-1"))
    assert receiver.describe().epoch == 0
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    time.sleep(0.06)
    with pytest.raises(DeadlineError):
        trainer.commit(1, digests, timeout_s=0.05)


def test_a_rank_is_believed_through_its_own_transport_only(engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    stranger = InMemoryTransport(trainer.fabric)
    peer = stranger.add_peer(trainer.receiver._epoch.transport.metadata())
    stranger.notify(peer, b"ws:1:1:0")
    with pytest.raises(DeadlineError):
        trainer.commit(1, digests, timeout_s=0.05)


def test_messages_of_other_versions_and_epochs_do_not_count(engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    for message in (b"ws:1:0:0", b"ws:0:1:0", b"ws:1:1:1", b"ws:1:11:0", b""):
        trainer.transport.notify(trainer.peer, message)
    with pytest.raises(DeadlineError):
        trainer.commit(1, digests, timeout_s=0.05)


# ------------------------------------------------------------------ tensors that move


@pytest.mark.parametrize(
    "move",
    [
        lambda m: setattr(m.norm, "weight", nn.Parameter(m.norm.weight.data.clone())),
        lambda m: setattr(m.norm.weight, "data", m.norm.weight.data.clone()),
        lambda m: setattr(m.norm.weight, "data", m.norm.weight.data.bfloat16()),
        lambda m: delattr(m.norm, "weight"),
    ],
)
def test_a_moved_tensor_is_found_before_any_byte(move, engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    trainer.fill(weights(1))
    move(engine.live)
    with pytest.raises(IdentityError, match=r"norm\.weight changed since it was registered"):
        trainer.begin(1)
    assert not receiver.dirty
    assert receiver.describe().epoch == 0


@pytest.mark.parametrize("pushed", [False, True])
def test_after_a_move_the_next_rendezvous_works(pushed, engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    if pushed:
        trainer.push(weights(1), 1)
    engine.live.norm.weight = nn.Parameter(engine.live.norm.weight.data.clone())
    with pytest.raises(IdentityError):
        trainer.begin(2)
    for version in (3, 4):
        trainer.rendezvous(weights())
        trainer.push(weights(version), version)
        assert serves(engine, weights(version))


def test_a_tensor_that_moves_in_mid_push_is_no_commit(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)
    engine.live.norm.weight = nn.Parameter(torch.zeros(8))
    with pytest.raises(IdentityError):
        trainer.commit(1, digests)
    assert (receiver.version, receiver.dirty) == (0, True)


def test_tied_weights_that_come_apart_are_found(tmp_path):
    def model() -> nn.Module:
        made = nn.ModuleDict({k: Bag(weight=torch.empty(4)) for k in ("embed", "head")})
        made["head"].weight = made["embed"].weight
        return made

    start = {"embed.weight": random_like(F32, 4)}
    engine = ToyAdapter(model, start=start, folder=tmp_path)
    _, trainer = new_pair(engine)
    trainer.rendezvous(start)
    engine.live["head"].weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(IdentityError, match=r"head\.weight"):
        trainer.begin(1)


def test_a_new_proof_in_mid_epoch_does_not_change_what_a_commit_installs(engine):
    _, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.receiver.attach(AttachBody("full"))
    trainer.begin(1)
    trainer.send(1)
    trainer.commit(1, digests)
    assert serves(engine, weights(1))


# ------------------------------------------------------------------ calls at the wrong moment


def test_a_push_without_a_rendezvous_is_refused(engine):
    receiver, trainer = new_pair(engine)
    with pytest.raises(NoSessionError):
        receiver.begin(BeginBody(1, 1, "p"))
    manifest = manifest_of(weights())
    receiver.layout(LayoutBody(4, "session", manifest.tensors))
    with pytest.raises(NoSessionError, match="no rank is connected"):
        receiver.begin(BeginBody(4, 1, "p"))
    with pytest.raises(StaleEpochError, match="epoch 3 is over"):
        receiver.begin(BeginBody(3, 1, "p"))
    assert not receiver.dirty
    assert trainer.epoch == 0


def test_a_version_that_does_not_grow_is_stale(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    trainer.push(weights(1), 5)
    for version in (4, 5):
        with pytest.raises(StaleVersionError, match=f"version {version} is not newer than 5"):
            trainer.begin(version)
    assert not receiver.dirty


def test_a_commit_of_another_version_than_was_begun_is_refused(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)
    with pytest.raises(NoSessionError, match="version 2 was never begun"):
        trainer.commit(2, digests)
    assert receiver.version == 0


def test_writes_that_leave_a_byte_out_or_write_one_twice_do_not_connect(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    (rank,) = trainer.connect_body.ranks
    kind = type(rank)
    for ranks in (
        [kind(0, rank.metadata, rank.writes[1:])],
        [rank, kind(1, rank.metadata, rank.writes[:1])],
        [rank, rank],
    ):
        with pytest.raises(PlanError):
            receiver.connect(ConnectBody(trainer.epoch, ranks))


def test_two_ranks_share_the_work_and_both_must_report(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    (rank,) = trainer.connect_body.ranks
    other = InMemoryTransport(trainer.fabric)
    parts = [
        type(rank)(0, rank.metadata, rank.writes[:1]),
        type(rank)(7, other.metadata(), rank.writes[1:]),
    ]
    receiver.connect(ConnectBody(trainer.epoch, parts))
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.send(1)  # rank 0's message alone
    with pytest.raises(DeadlineError, match=r"ranks \[7\]"):
        trainer.commit(1, digests, timeout_s=0.05)
