"""Does a worker serve what a rendezvous would write?"""

from __future__ import annotations

import pytest

from tests.receiver.mixed import make, serves, weights
from tests.receiver.toys import Trainer, Weights, new_pair, state_of
from weightsync.errors import PushInProgressError, StaleEpochError, VerifyError
from weightsync.transport.base import WriteOp
from weightsync.worker_messages import RankDigestsBody, VerifyBody, VerifyReply


def verify(trainer: Trainer, given: Weights, *, stage: bool = True) -> VerifyReply:
    """As a client does: write what is staged, then hand over all digests."""
    layout = trainer.rendezvous(given).layout
    digests = trainer.fill(given)
    staged = [
        WriteOp(
            trainer.slab.data_ptr() + w.slot_offset,
            layout.regions[w.region].addr + w.offset,
            w.nbytes,
        )
        for w in trainer.plan.writes[0]
        if layout.regions[w.region].mode == "staged"
    ]
    if stage:
        write = trainer.transport.prepare(trainer.peer, staged)
        trainer.transport.post(write, b"part")
        trainer.transport.wait([write], timeout_s=5)
    return trainer.receiver.verify(
        VerifyBody(trainer.epoch, [RankDigestsBody(trainer.rank, digests)])
    )


def test_what_was_pushed_is_found_and_nothing_else_is_changed(engine):
    receiver, trainer = new_pair(engine)
    assert verify(trainer, weights()) == VerifyReply(6, [])  # as loaded
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    before = state_of(engine.live)
    assert verify(trainer, weights(1)) == VerifyReply(6, [])
    assert len(verify(trainer, weights(2)).differs) == 6
    assert state_of(engine.live) == before
    assert (receiver.version, receiver.dirty) == (1, False)
    assert serves(engine, weights(1))


@pytest.mark.parametrize("name", ["q.weight", "norm.weight", "packed.weight", "copied.weight"])
def test_one_other_tensor_is_named_direct_staged_or_renewed(engine, name):
    _, trainer = new_pair(engine)
    other = weights() | {name: weights(7)[name]}
    differs = dict(verify(trainer, other).differs)
    assert differs.keys() == {"qkv.weight" if name == "q.weight" else name}


def test_a_stale_copy_beside_a_right_weight_is_found(engine):
    _, trainer = new_pair(engine)
    engine.live.copied.copy[0, 0] += 1
    ((name, what),) = verify(trainer, weights()).differs
    assert name == "copied.weight"
    assert "another copy" in what


def test_an_engine_that_nothing_was_proven_of_is_compared_all_the_same():
    engine = make(None)
    _, trainer = new_pair(engine)
    assert verify(trainer, weights()).differs == []
    other = verify(trainer, weights() | {"norm.weight": weights(3)["norm.weight"]})
    assert [name for name, _ in other.differs] == ["norm.weight"]


def test_a_buffer_that_was_not_written_says_nothing_about_the_engine(engine):
    _, trainer = new_pair(engine)
    with pytest.raises(VerifyError, match="buffer for packed"):
        verify(trainer, weights(), stage=False)


def test_it_is_refused_while_a_push_writes_and_in_another_epoch(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    body = VerifyBody(trainer.epoch, [RankDigestsBody(0, trainer.fill(weights(1)))])
    trainer.begin(1)
    with pytest.raises(PushInProgressError):
        receiver.verify(body)
    with pytest.raises(StaleEpochError):
        receiver.verify(VerifyBody(trainer.epoch + 1, body.ranks))
