from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.receiver.toys import (
    BF16,
    F16,
    F32,
    Bag,
    Pairs,
    agree,
    bag,
    by_name,
    each,
    into_p,
    traced,
    weights_of,
)
from weightsync.errors import ManifestError, TraceError
from weightsync_server.receiver.target import copies_by_tensor

HEADS, DIM, HIDDEN = 4, 3, 5


def neox(t: torch.Tensor) -> torch.Tensor:
    return t.view(HEADS, 3, DIM, HIDDEN).transpose(0, 1).reshape(3 * HEADS * DIM, HIDDEN)


VIEWS = {
    "narrow": ((8, 6), lambda t: t.narrow(0, 2, 4), (4, 6)),
    "chunk": ((8, 6), lambda t: t.chunk(2, dim=1)[1], (8, 3)),
    "transpose": ((8, 6), lambda t: t.t(), (6, 8)),
    "unbind": ((3, 4, 5), lambda t: t.unbind(0)[2], (4, 5)),
    "select": ((3, 4, 5), lambda t: t.select(1, 3), (3, 5)),
    "split": ((9, 4), lambda t: t.split([2, 3, 4])[1], (3, 4)),
    "flatten": ((3, 4, 5), lambda t: t.flatten(1), (3, 20)),
    "view": ((12, 5), lambda t: t.view(3, 4, 5), (3, 4, 5)),
    "reshape that copies": ((6, 4), lambda t: t.t().reshape(3, 8), (3, 8)),
    "permuted qkv": ((3 * HEADS * DIM, HIDDEN), neox, (3 * HEADS * DIM, HIDDEN)),
    "a part of permuted qkv": (
        (3 * HEADS * DIM, HIDDEN),
        lambda t: neox(t).narrow(0, 10, 13),
        (13, HIDDEN),
    ),
    "a copy of a part of permuted qkv": (
        (3 * HEADS * DIM, HIDDEN),
        lambda t: neox(t).narrow(0, DIM * HEADS, DIM * HEADS).contiguous().t(),
        (HIDDEN, DIM * HEADS),
    ),
    "contiguous": ((6, 4), lambda t: t.t().contiguous().view(2, 12), (2, 12)),
    "clone keeps strides": ((6, 4), lambda t: t.t().clone().t().view(-1), (24,)),
    "clone of an expanded one": ((1, 4), lambda t: t.expand(3, 4).clone(), (3, 4)),
    "through int index and step": ((8, 6), lambda t: t[1::2, 3], (4,)),
    "in-place view": ((4, 6), lambda t: t.unsqueeze_(0).transpose_(1, 2).squeeze_(0), (6, 4)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_traced_to_what_the_loader_really_does(name):
    shape, view, target = VIEWS[name]
    found = agree(bag(p=target), into_p(view), weights_of(w=shape))
    assert found.copies
    assert not found.skipped


def fused(module: nn.Module, tensors: Pairs) -> None:
    """q, k, v and gate, up into one parameter each; experts into a stack."""
    at = {"q": ("qkv", 0, 8), "k": ("qkv", 8, 4), "v": ("qkv", 12, 4)}
    at |= {"gate": ("gate_up", 0, 6), "up": ("gate_up", 6, 6)}
    for name, t in tensors:
        if name in at:
            param, start, size = at[name]
            getattr(module, param).data.narrow(0, start, size).copy_(t)
        else:
            module.experts.data[int(name.removeprefix("expert"))].copy_(t.t())


def test_fused_and_stacked_parameters_get_their_parts_at_their_offsets():
    parts = {"q": (8, 5), "k": (4, 5), "v": (4, 5), "gate": (6, 5), "up": (6, 5)}
    experts = {f"expert{i}": (7, 5) for i in range(3)}
    model = bag(qkv=(16, 5), gate_up=(12, 5), experts=(3, 5, 7))
    found = agree(model, fused, weights_of(**parts, **experts))
    assert len(found.copies) == 8


@pytest.mark.parametrize(("source", "target"), [(BF16, F32), (F32, BF16), (F16, F32), (F32, F16)])
def test_casts_are_recorded_by_the_last_dtype_alone(source, target):
    def load(module: nn.Module, tensors: Pairs) -> None:
        for _, t in tensors:
            module.p.data.copy_(t.to(F32).t())

    agree(bag(target, p=(4, 6)), load, weights_of(source, w=(6, 4)))


def test_a_second_lossy_cast_is_refused_with_the_dtype_to_publish():
    load = into_p(lambda t: t.to(BF16).float())
    with pytest.raises(TraceError, match=r"casts w through .*bfloat16") as error:
        traced(bag(p=(4,)), load, weights_of(w=(4,)))
    assert "bfloat16" in error.value.hint


def test_a_lossless_detour_is_no_second_cast():
    agree(bag(BF16, p=(4,)), into_p(lambda t: t.to(F32).to(BF16)), weights_of(BF16, w=(4,)))


def test_scalars_are_copied_as_tensors_and_through_item():
    def load(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            if name == "a":
                module.p.data[0].copy_(t)
            elif name == "b":
                module.p.data[1].fill_(t.item())
            else:
                module.p.data[2:].fill_(t)

    model = bag(p=(4,))
    found = agree(model, load, weights_of(a=(), b=(1,), c=()))
    assert {c.tensor for c in found.copies} == {"a", "b", "c"}


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.p.data.fill_(x * 2),
        lambda m, x: m.p.data.fill_(1.0 / x),
        lambda m, x: m.p.data.fill_(max(x, 1e-4)),
        lambda m, x: m.p.data.fill_(int(x)),
        lambda m, x: m.p.data.fill_(0.0 if x < 1 else 1.0),
        lambda m, x: setattr(m, "scale", x),
        lambda m, x: None,
    ],
)
def test_arithmetic_on_an_item_is_refused_and_names_the_tensor(use):
    load = each(lambda m, _, t: use(m, t.item()))
    with pytest.raises(TraceError, match="the_scale"):
        traced(bag(p=(4,)), load, weights_of(the_scale=()))


def test_an_item_of_a_computed_value_is_refused():
    with pytest.raises(TraceError, match="the_scale"):
        traced(
            bag(p=(4,)),
            each(lambda m, _, t: m.p.data.fill_(t.max().item())),
            weights_of(the_scale=(3,)),
        )


def test_deciding_by_an_integer_weight_is_refused():
    def load(module: nn.Module, tensors: Pairs) -> None:
        for _, t in tensors:
            if t.item() > 3:
                module.p.data.zero_()

    with pytest.raises(TraceError, match="decides by the value of flag"):
        traced(bag(p=(4,)), load, weights_of(torch.int64, flag=()))


@pytest.mark.parametrize("shape", [(1, 5), (5,), (4, 1), ()])
def test_a_broadcasting_copy_has_stride_zero_and_is_right(shape):
    agree(bag(p=(4, 5)), into_p(lambda t: t), weights_of(w=shape))


def test_a_copy_whose_shapes_do_not_fit_is_refused_as_torch_would():
    with pytest.raises(ManifestError, match=r"refuses w \(float32 \[8\]\)"):
        traced(bag(p=(4,)), into_p(lambda t: t), weights_of(w=(8,)))


def test_writing_through_an_expanded_view_is_refused():
    load = each(lambda m, _, t: m.p.data.expand(3, 4).copy_(t))
    with pytest.raises(TraceError, match="expanded view from w"):
        traced(bag(p=(4,)), load, weights_of(w=(3, 4)))


def padded(module: nn.Module, tensors: Pairs) -> None:
    for _, t in tensors:
        module.p.data[: len(t)].copy_(t)
        module.p.data[len(t) :].fill_(0)


def test_padding_fills_are_reported_and_are_no_copies():
    found = agree(bag(p=(8, 3)), padded, weights_of(w=(5, 3)))
    assert [(name, r.offset, r.shape) for name, r in found.fills] == [("p", 15, (3, 3))]


def test_zeroing_first_and_copying_then_is_a_copy():
    def load(module: nn.Module, tensors: Pairs) -> None:
        module.p.data.zero_()
        by_name(module, tensors)

    assert agree(bag(p=(4, 3)), load, weights_of(p=(4, 3))).fills


def test_a_fill_over_loaded_weights_is_refused():
    def load(module: nn.Module, tensors: Pairs) -> None:
        by_name(module, tensors)
        module.p.data[2:].fill_(1.0)

    with pytest.raises(TraceError, match="fills a part of p that it has loaded"):
        traced(bag(p=(4, 3)), load, weights_of(p=(4, 3)))


def test_tensors_that_the_loader_drops_are_listed():
    def load(module: nn.Module, tensors: Pairs) -> None:
        by_name(module, [(k, t) for k, t in tensors if "rotary" not in k])

    found = agree(bag(p=(4,)), load, weights_of(rotary=(3,), p=(4,), other_rotary=()))
    assert found.skipped == ("rotary", "other_rotary")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = Bag(weight=torch.empty(6, 4))
        self.head = Bag(weight=torch.empty(6, 4))
        self.head.weight = self.embed.weight


def test_a_shared_parameter_has_one_name_and_the_last_write_wins():
    found = agree(Tied, by_name, weights_of(**{"embed.weight": (6, 4), "head.weight": (6, 4)}))
    (copies,) = copies_by_tensor(found).values()
    assert [(c.tensor, c.param) for c in copies] == [("head.weight", "embed.weight")]


def test_the_last_write_wins_in_whatever_spelling_and_keeps_the_order():
    def load(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            if name == "b":
                module.p.data.view(-1)[4:].copy_(t)
            else:
                (module.p.data if name == "a" else module.p.data.view(-1)).copy_(t)

    found = agree(bag(p=(4, 3)), load, weights_of(a=(4, 3), b=(8,), c=(12,)))
    assert [c.tensor for c in copies_by_tensor(found)["p"]] == ["b", "c"]


def test_buffers_are_loaded_too():
    def model() -> nn.Module:
        made = Bag(p=torch.empty(3))
        made.register_buffer("mean", torch.empty(3))
        made.register_buffer("steps", torch.empty((), dtype=torch.int64))
        return made

    given = weights_of(p=(3,), mean=(3,)) | {"steps": torch.tensor(7)}
    assert len(agree(model, by_name, given).copies) == 3
