"""Whole pushes into a toy engine, and manifests that do not fit it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.mixed import BF16, F32, load, make, serves, weights
from tests.receiver.toys import (
    Bag,
    Pairs,
    ToyAdapter,
    new_pair,
    random_like,
    state_of,
)
from weightsync.errors import (
    DeadlineError,
    LayoutError,
    ManifestError,
    NoSessionError,
    PlanError,
    RefusedError,
    StaleEpochError,
    TraceError,
)
from weightsync.transport.base import WriteOp
from weightsync.worker_messages import (
    AttachBody,
    ConnectBody,
)

# ------------------------------------------------------------------ pushes that work


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_pushes_leave_what_a_fresh_load_would(engine, dtype):
    receiver, trainer = new_pair(engine)
    reply = trainer.rendezvous(weights(dtype=dtype))
    modes = {r.name: r.mode for r in reply.layout.regions}
    assert {k for k, v in modes.items() if v == "staged"} == {"packed.weight"}
    for version in (1, 2, 5):
        given = weights(version, dtype)
        assert trainer.push(given, version).version == version
        assert serves(engine, given)
        assert (receiver.version, receiver.dirty) == (version, False)
    assert engine.refreshed == 3


def test_a_probe_goes_to_scratch_memory_that_no_engine_reads(engine):
    """At any time, paused or not (WS-1); in a push its message counts for nothing (WS-2)."""
    _, trainer = new_pair(engine)
    layout = trainer.rendezvous(weights()).layout
    trainer.push(weights(1), 1)
    scratch = layout.scratch
    assert all(
        r.addr + r.nbytes <= scratch.addr or scratch.addr + scratch.nbytes <= r.addr
        for r in layout.regions
    )
    trainer.slab.fill_(0xFF)
    op = WriteOp(trainer.slab.data_ptr(), scratch.addr, min(trainer.slab.numel(), scratch.nbytes))
    with trainer.transport.prepare(trainer.peer, [op]) as probe:
        trainer.transport.post(probe, b"probe:1:0")
        trainer.transport.wait([probe], timeout_s=5)
    assert serves(engine, weights(1))
    trainer.begin(2)
    given = trainer.fill(weights(2))
    with pytest.raises(DeadlineError, match="did not report"):
        trainer.commit(2, given, timeout_s=0.05)


def test_padding_is_untouched_and_no_rank_may_write_it(engine):
    receiver, trainer = new_pair(engine)
    layout = trainer.rendezvous(weights()).layout
    index = next(i for i, r in enumerate(layout.regions) if r.name == "embed.weight")
    assert layout.regions[index].untouched == ((7 * 8 * 2, 10 * 8 * 2),)
    (rank,) = trainer.connect_body.ranks
    greedy = [(r, o, n) for r, o, n in rank.writes if r != index] + [(index, 0, 160)]
    with pytest.raises(PlanError, match="untouched"):
        receiver.connect(ConnectBody(trainer.epoch, [type(rank)(0, rank.metadata, greedy)]))


def test_without_a_checkpoint_the_first_push_goes_through_the_loader_and_later_ones_direct():
    engine = make(None)
    receiver, trainer = new_pair(engine)
    assert receiver.attach(AttachBody("windows")).warnings
    first = trainer.rendezvous(weights(1))
    assert {r.mode for r in first.layout.regions} == {"staged"}
    assert trainer.push(weights(1), 1).epoch_over
    assert serves(engine, weights(1))
    trainer.fill(weights(2))
    with pytest.raises((StaleEpochError, NoSessionError)):
        trainer.begin(2)
    second = trainer.rendezvous(weights(2))
    assert sum(r.mode == "direct" for r in second.layout.regions) == 5
    assert not trainer.push(weights(2), 2).epoch_over
    assert serves(engine, weights(2))


def test_a_first_push_whose_loader_disobeys_its_trace_is_refused_and_nothing_changes():
    def by_place(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            load(module, [(name, t)])
            if not t.is_meta and name == "qkv.bias":
                module.qkv.bias.data.mul_(2)

    engine = make(None)
    engine._load = by_place
    before = state_of(engine.live)
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights(1))
    with pytest.raises(LayoutError, match=r"another qkv\.bias than its trace predicted"):
        trainer.push(weights(1), 1)
    assert not receiver.dirty
    assert receiver.version == 0
    assert state_of(engine.live) == before


def test_a_commit_that_is_repeated_gets_the_same_answer_and_installs_once(engine):
    receiver, trainer = new_pair(engine)
    trainer.rendezvous(weights())
    digests = trainer.fill(weights(1))
    trainer.begin(1)
    trainer.begin(1)  # so may a begin
    trainer.send(1)
    first = trainer.commit(1, digests)
    assert trainer.commit(1, digests) == first
    assert engine.refreshed == 1
    with pytest.raises(NoSessionError, match="never begun"):
        trainer.commit(1, digests, push_id="another")
    assert receiver.version == 1


def test_a_repeated_commit_of_a_first_push_is_answered_though_its_epoch_is_over():
    _, trainer = new_pair(make(None))
    trainer.rendezvous(weights(1))
    first = trainer.push(weights(1), 1)
    assert trainer.commit(1, []) == first


# ------------------------------------------------------------------ manifests that do not fit


def test_missing_tensors_are_named_from_the_engines_own_checkpoint(engine):
    _, trainer = new_pair(engine)
    given = {k: v for k, v in weights().items() if k not in {"kv.weight", "norm.weight"}}
    with pytest.raises(ManifestError, match=r"missing: kv\.weight, norm\.weight") as error:
        trainer.rendezvous(given)
    assert error.value.context["kernel_tensors"] == ["norm.weight", "qkv.weight"]


def test_without_a_checkpoint_missing_tensors_are_named_as_the_engine_does():
    _, trainer = new_pair(make(None))
    given = {k: v for k, v in weights().items() if k not in {"kv.weight", "norm.weight"}}
    with pytest.raises(ManifestError, match=r"nothing is loaded into norm\.weight, qkv\.weight"):
        trainer.rendezvous(given)


def test_what_the_engine_calls_optional_need_not_be_published_where_nothing_was_loaded():
    given = {"weight": random_like(BF16, 4, 6)}

    def engine() -> ToyAdapter:
        scales = given | {"k_scale": torch.ones(())}
        return ToyAdapter(
            lambda: Bag(weight=torch.empty(4, 6, dtype=BF16), k_scale=torch.empty(())),
            start=scales,
        )

    with pytest.raises(ManifestError, match="nothing is loaded into k_scale"):
        new_pair(engine())[1].rendezvous(given)

    class Lenient(ToyAdapter):
        def optional(self, twin: nn.Module) -> frozenset[str]:
            return frozenset({"k_scale"} & dict(twin.named_parameters()).keys())

    adapter = engine()
    adapter.__class__ = Lenient
    receiver, trainer = new_pair(adapter)
    trainer.rendezvous(given)
    assert trainer.push(given, 1).version == 1
    assert not receiver.dirty
    assert torch.equal(adapter.live.weight, given["weight"])
    assert adapter.live.k_scale == 1


def test_a_constant_does_not_replace_what_the_checkpoint_loads(tmp_path):
    def fills(module: nn.Module, tensors: Pairs) -> None:
        module.norm.weight.data.zero_()
        load(module, tensors)

    engine = make(tmp_path)
    engine._load = fills
    _, trainer = new_pair(engine)
    with pytest.raises(ManifestError, match=r"missing: norm\.weight"):
        trainer.rendezvous({k: v for k, v in weights().items() if k != "norm.weight"})


def test_a_tensor_that_the_engines_checkpoint_lacks_is_refused_not_dropped(tmp_path):
    """It has a place in the engine, but nothing was proven about it."""
    less = {k: v for k, v in weights().items() if k != "qkv.bias"}
    engine = make(tmp_path, start=less)
    _, trainer = new_pair(engine)
    with pytest.raises(RefusedError, match=r"qkv\.bias.*nothing is proven"):
        trainer.rendezvous(weights(1))
    trainer.rendezvous(less)
    trainer.push({k: v for k, v in weights(1).items() if k in less}, 1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("q.weight", torch.float8_e4m3fn),
        ("q.weight", torch.int8),
        ("norm.weight", torch.float8_e5m2),
        ("qkv.bias", torch.bool),
    ],
)
def test_codes_and_scaled_values_are_never_cast(name, dtype, engine):
    _, trainer = new_pair(engine)
    given = weights()
    given[name] = torch.zeros(given[name].shape).to(dtype)
    with pytest.raises(ManifestError, match=f"{name} is {dtype}"):
        trainer.rendezvous(given)


def test_integers_of_another_width_are_refused(tmp_path):
    start = {"p": torch.arange(4, dtype=torch.int32)}
    engine = ToyAdapter(
        lambda: Bag(p=torch.empty(4, dtype=torch.int32)), start=start, folder=tmp_path
    )
    _, trainer = new_pair(engine)
    with pytest.raises(ManifestError, match=r"p is torch\.int64"):
        trainer.rendezvous({"p": torch.arange(4)})
    trainer.rendezvous(start)
    trainer.push({"p": torch.tensor([3, 1, 2, 0], dtype=torch.int32)}, 1)
    assert engine.live.p.tolist() == [3, 1, 2, 0]


def test_a_loader_that_computes_is_refused_and_the_engine_keeps_its_weights(engine):
    before = state_of(engine.live)
    receiver, trainer = new_pair(engine)
    engine._load = lambda m, ts: load(m, [(k, t * 2) for k, t in ts])
    with pytest.raises(TraceError, match=r"embed\.weight through aten\.mul"):
        trainer.rendezvous(weights())
    assert state_of(engine.live) == before
    assert receiver.describe().epoch == 0


def test_broadcast_tensors_survive_a_first_push_through_the_loader():
    def wide(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            getattr(module, name).data.copy_(t)

    model = lambda: Bag(a=torch.empty(3, 4), b=torch.empty(4))  # noqa: E731
    start = {"a": torch.zeros(4), "b": torch.zeros(4)}
    engine = ToyAdapter(model, start=start, load=wide)
    _, trainer = new_pair(engine)
    for version in (1, 2):
        given = {"a": random_like(F32, 4, seed=version), "b": random_like(F32, 4, seed=9)}
        trainer.rendezvous(given)
        trainer.push(given, version)
        assert torch.equal(engine.live.a, given["a"].expand(3, 4))
