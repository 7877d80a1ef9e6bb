"""Loaders made of random chains of views: the replayed trace is what the loader does."""

from __future__ import annotations

import math

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.receiver.toys import Bag, Pairs, agree
from weightsync.errors import TraceError
from weightsync_server.receiver.regions import Strided, pieces

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

DTYPES = {torch.float32: [torch.float32, torch.bfloat16], torch.bfloat16: [torch.float32]}


def factors(draw: st.DrawFn, n: int) -> list[int]:
    """A random shape of ``n`` elements."""
    shape = []
    while n > 1:
        shape.append(draw(st.sampled_from([d for d in range(2, n + 1) if n % d == 0])))
        n //= shape[-1]
    return draw(st.permutations(shape))


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, object]]]:
    """A shape, and operations that can be done to a tensor of it one after another."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    t = torch.empty(shape, device="meta")
    steps: list[tuple[str, object]] = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["narrow", "permute", "reshape", "select", "copy", "expand"]))
        arg: object
        if kind == "narrow" and t.ndim:
            dim = draw(st.integers(0, t.ndim - 1))
            start = draw(st.integers(0, t.shape[dim] - 1))
            arg = (dim, start, draw(st.integers(1, t.shape[dim] - start)))
        elif kind == "permute":
            arg = draw(st.permutations(range(t.ndim)))
        elif kind == "reshape":
            arg = factors(draw, t.numel())
        elif kind == "select" and t.ndim:
            dim = draw(st.integers(0, t.ndim - 1))
            arg = (dim, draw(st.integers(0, t.shape[dim] - 1)))
        elif kind == "expand" and t.numel() < 200:
            arg = (draw(st.integers(2, 3)), *t.shape)
        else:
            kind, arg = "copy", draw(st.sampled_from(["clone", "contiguous", "float", "buffer"]))
        steps.append((kind, arg))
        t = apply(t, [steps[-1]])
    return tuple(shape), steps


def apply(t: torch.Tensor, steps: list[tuple[str, object]]) -> torch.Tensor:
    for kind, arg in steps:
        if kind != "copy":
            t = getattr(t, kind)(*arg) if kind in {"narrow", "select"} else getattr(t, kind)(arg)
        elif arg == "buffer":
            t = torch.zeros(t.shape, dtype=t.dtype, device=t.device).copy_(t)
        else:
            t = getattr(t, arg)()
    return t


@quick
@given(data=st.data(), chain=chains())
def test_replaying_the_trace_equals_running_the_loader(data, chain):
    shape, steps = chain
    source = data.draw(st.sampled_from(list(DTYPES)))
    target = data.draw(st.sampled_from(DTYPES[source]))
    result = apply(torch.empty(shape, device="meta"), steps)
    dst = tuple(data.draw(st.permutations(range(result.ndim))))
    before = data.draw(st.integers(0, 3))
    base = math.prod(result.shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(base)).to(source)

    def load(module: nn.Module, tensors: Pairs) -> None:
        for _, t in tensors:
            out = apply(t, steps)
            into = module.p.data[before : before + base].view([out.shape[d] for d in dst])
            into.permute([dst.index(d) for d in range(len(dst))]).copy_(out)

    try:
        found = agree(lambda: Bag(p=torch.empty(base + 5, dtype=target)), load, {"w": weight})
    except TraceError:
        event("refused")  # a copy of many regions: that is allowed, wrong bytes are not
    else:
        assert all(c.tensor == "w" for c in found.copies)


@quick
@given(chain=chains(), data=st.data())
def test_pieces_of_a_view_hold_each_of_its_elements_once(chain, data):
    shape, steps = chain
    numbers = torch.arange(math.prod(shape)).view(shape)
    base = apply(numbers, [s for s in steps if s[0] != "copy"])
    copied = base.contiguous().clone(memory_format=torch.contiguous_format)
    start = data.draw(st.integers(0, copied.numel() - 1))
    part = copied.view(-1)[start : start + data.draw(st.integers(1, copied.numel() - start))]
    part = part.view(factors(data.draw, part.numel()))
    part = part.permute(data.draw(st.permutations(range(part.ndim))))
    if base.untyped_storage().data_ptr() != numbers.untyped_storage().data_ptr():
        numbers = base  # a reshape copied: the base is a tensor of its own

    found = pieces(Strided.of(base), Strided.of(part))

    assert found is not None
    flat = torch.as_strided(numbers, (numbers.untyped_storage().nbytes() // 8,), (1,), 0)
    made = torch.full((part.numel(),), -1)
    times = torch.zeros(part.numel())
    whole = Strided.of(torch.empty(part.shape))
    for piece, to in zip(found, whole.along(found), strict=True):
        r = piece.region
        source = flat.as_strided(r.shape, r.strides, r.offset)
        made.as_strided(to.shape, to.strides, to.offset).copy_(source)
        times.as_strided(to.shape, to.strides, to.offset).add_(1)
    assert torch.equal(made.view(part.shape), part)
    assert bool((times == 1).all())
