"""Live weights that are not what the checkpoint and the loader say: refused, or written right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.finishing import (
    KINDS,
    Linear,
    engine,
    fill_buffer,
    keep_derived_number,
    keep_packed_copy,
    kind_of,
    nothing,
    on_linear,
    repack_in_new_memory,
    weights,
)
from tests.receiver.toys import (
    Bag,
    ToyAdapter,
    Weights,
    new_pair,
    random_like,
)
from weightsync.errors import LayoutError, RefusedError

# ------------------------------------------------------------------ live weights that are others


@pytest.mark.parametrize("name", KINDS)
def test_a_live_weight_that_differs_in_one_byte_is_never_direct(name, tmp_path):
    change, _ = KINDS[name]
    adapter = engine(change, tmp_path)
    raw = adapter.live.lin.weight.data.view(-1).view(torch.uint8)
    raw[17] ^= 1
    receiver, trainer = new_pair(adapter)
    assert receiver._attachment.proofs.mode("lin.weight") == "refused"
    with pytest.raises(RefusedError, match=r"another weight than the engine serves"):
        trainer.rendezvous(weights())


@pytest.mark.parametrize("stale", ["packed", "scale", "table"])
def test_a_derived_tensor_that_is_stale_is_refused(stale, tmp_path):
    def finish(m: Linear) -> None:
        keep_packed_copy(m)
        keep_derived_number(m)
        fill_buffer(m)

    adapter = engine(finish, tmp_path)
    lin = adapter.live.lin
    setattr(lin, stale, 0.5 if stale == "scale" else getattr(lin, stale) + 1)
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match=stale):
        trainer.rendezvous(weights())


def test_a_live_weight_in_the_middle_of_a_larger_storage_is_written_where_it_is(tmp_path):
    adapter = engine(nothing, tmp_path)
    room = torch.zeros(100)
    room[30:66] = adapter.live.lin.weight.data.view(-1)
    adapter.live.lin.weight.data = room[30:66].view(6, 6)
    receiver, trainer = new_pair(adapter)
    assert kind_of(receiver) == "direct"
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    assert torch.equal(room[30:66].view(6, 6), weights(1)["lin.weight"])
    assert not room[:30].any()
    assert not room[66:].any()


def test_a_live_weight_with_other_strides_is_staged_and_right(tmp_path):
    adapter = engine(nothing, tmp_path)
    adapter.live.lin.weight.data = adapter.live.lin.weight.data.t().contiguous().t()
    receiver, trainer = new_pair(adapter)
    assert kind_of(receiver) == "staged"
    trainer.rendezvous(weights())
    trainer.push(weights(1), 1)
    assert torch.equal(adapter.live.lin.weight, weights(1)["lin.weight"])


# ------------------------------------------------------------------ tied weights


class Embeddings(nn.Module):
    tied = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = Bag(weight=torch.empty(6, 4))
        self.head = Bag(weight=torch.empty(6, 4))
        if self.tied:
            self.head.weight = self.embed.weight


class TiedEmbeddings(Embeddings):
    tied = True


def pair_of(seed: int = 0) -> Weights:
    w = random_like(torch.float32, 6, 4, seed=seed)
    return {"embed.weight": w, "head.weight": w.clone()}


def test_tied_weights_are_one_region_and_one_write(tmp_path):
    adapter = ToyAdapter(TiedEmbeddings, start=pair_of(), folder=None)
    assert adapter.live.head.weight is adapter.live.embed.weight
    _, trainer = new_pair(adapter)
    for version in (1, 2):
        reply = trainer.rendezvous(pair_of(version))
        assert len(reply.layout.regions) == 1
        assert reply.layout.skipped == ("embed.weight",)
        trainer.push(pair_of(version), version)
        assert torch.equal(adapter.live.head.weight, pair_of(version)["head.weight"])
    assert adapter.live.head.weight.data_ptr() == adapter.live.embed.weight.data_ptr()


@pytest.mark.parametrize("part", [slice(None), slice(3, None)])
def test_weights_that_load_apart_and_share_live_memory_are_refused(part, tmp_path):
    adapter = ToyAdapter(Embeddings, start=pair_of(), folder=tmp_path)
    adapter.live.head.weight.data = adapter.live.embed.weight.data[part]
    _, trainer = new_pair(adapter)
    with pytest.raises(RefusedError, match="share memory in the live engine, and load apart"):
        trainer.rendezvous(pair_of())


def test_tied_weights_that_the_live_engine_holds_apart_are_both_written(tmp_path):
    adapter = ToyAdapter(TiedEmbeddings, start=pair_of(), folder=tmp_path)
    adapter.live.head.weight = nn.Parameter(adapter.live.embed.weight.clone(), requires_grad=False)
    receiver, trainer = new_pair(adapter)
    assert kind_of(receiver, "head") == "staged"
    trainer.rendezvous(pair_of())
    trainer.push(pair_of(1), 1)
    assert torch.equal(adapter.live.head.weight, pair_of(1)["head.weight"])
    assert torch.equal(adapter.live.embed.weight, pair_of(1)["head.weight"])


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Linear()
        self.second = self.first


def test_a_module_under_two_paths_is_finished_once(tmp_path):
    start = {"first.weight": random_like(torch.float32, 6, 6)}
    adapter = ToyAdapter(
        Shared, start=start, finish=on_linear(repack_in_new_memory), folder=tmp_path
    )
    receiver, trainer = new_pair(adapter)
    assert [u.path for u in receiver._attachment.proofs.units] == ["first"]
    trainer.rendezvous(start)
    new = {"first.weight": random_like(torch.float32, 6, 6, seed=9)}
    trainer.push(new, 1)
    assert torch.equal(adapter.live.second.weight, new["first.weight"].t())


def test_a_module_under_two_paths_that_the_live_engine_holds_apart_is_refused(tmp_path):
    start = {"first.weight": random_like(torch.float32, 6, 6)}
    adapter = ToyAdapter(Shared, start=start, folder=tmp_path)
    adapter.live.second = Linear()
    _, trainer = new_pair(adapter)
    with pytest.raises(LayoutError, match="second"):
        trainer.rendezvous(start)
