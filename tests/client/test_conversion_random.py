"""Random rules over random shapes and shards: the boxes have what torch makes of the whole."""

from __future__ import annotations

import math
from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync_client import (
    Concat,
    ConversionSpec,
    LocalShard,
    Rearrange,
    Rule,
    Split,
    Stack,
    Unstack,
)
from weightsync_client.source import as_source

LETTERS = "abcdef"


@st.composite
def rearrangements(draw, shape):
    """A random pattern for tensors of that shape, and torch's own doing of it."""
    before, sizes, names = [], {}, iter(LETTERS)
    for n in shape:
        factor = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        if draw(st.booleans()):
            outer, inner = next(names), next(names)
            before.append((outer, inner))
            sizes |= {outer: factor, inner: n // factor}
        else:
            before.append((next(names),))
            sizes[before[-1][0]] = n
    flat = [name for group in before for name in group]
    order = draw(st.permutations(flat))
    after, rest = [], list(order)
    while rest:
        k = draw(st.integers(1, len(rest)))
        after.append(tuple(rest[:k]))
        rest = rest[k:]
    sides = (
        " ".join(f"({' '.join(g)})" if len(g) > 1 else g[0] for g in x) for x in (before, after)
    )

    def by_torch(whole):
        whole = whole.reshape([sizes[name] for name in flat])
        whole = whole.permute([flat.index(name) for name in order])
        return whole.reshape([math.prod(sizes[n] for n in group) for group in after])

    return Rearrange(" -> ".join(sides), sizes), by_torch


def parts_of(draw, size: int) -> tuple[int, ...]:
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else []
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True))


@st.composite
def conversions(draw):
    """Whole tensors, a rule, and what it makes of them."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    kind = draw(
        st.sampled_from(["rearrange", "split", "concat", "unstack", "stack", "stack_split"])
    )
    count = draw(st.integers(1, 3))
    numel = math.prod(shape)
    many = [torch.arange(numel).reshape(shape) + k * numel for k in range(count)]
    step, by_torch = draw(rearrangements(shape))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    if kind == "rearrange":
        return {"w": many[0]}, Rule("w", "v", step), {"v": by_torch(many[0])}
    if kind == "split":
        whole = by_torch(many[0])
        dim = draw(st.integers(0, whole.ndim - 1))
        sizes = parts_of(draw, whole.shape[dim])
        made = {f"v{k}": part for k, part in enumerate(whole.split(sizes, dim))}
        return {"w": many[0]}, Rule("w", tuple(made), [step, Split(dim, sizes)]), made
    if kind == "concat":
        tensors = {f"w{k}": t for k, t in enumerate(many)}
        rule = Rule(tuple(tensors), "v", [Concat(dim), step])
        step, by_torch = draw(rearrangements(tuple(torch.cat(many, dim).shape)))
        rule = Rule(tuple(tensors), "v", [Concat(dim), step])
        return tensors, rule, {"v": by_torch(torch.cat(many, dim))}
    if kind == "unstack":
        made = {f"v.{k}": t for k, t in enumerate(many[0].unbind(dim))}
        return {"w": many[0]}, Rule("w", "v.{e}", Unstack("e", dim)), made
    tensors = {f"w.{k}": t for k, t in enumerate(many)}
    dim = draw(st.integers(0, len(shape)))
    whole = torch.stack(many, dim)
    if kind == "stack":
        return tensors, Rule("w.{e}", "v", Stack("e", dim)), {"v": whole}
    sizes = parts_of(draw, whole.shape[0])
    made = {f"v{k}": part for k, part in enumerate(whole.split(sizes))}
    return tensors, Rule("w.{e}", tuple(made), [Stack("e", dim, count), Split(0, sizes)]), made


def cut(draw, whole: torch.Tensor) -> list[LocalShard]:
    """All shards of a grid that cuts every dim anywhere, some of them transposed in memory."""
    spans = []
    for n in whole.shape:
        sizes = parts_of(draw, n)
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        spans.append([(end - size, end) for size, end in zip(sizes, ends, strict=True)])
    out = []
    for pick in product(*spans):
        part = whole[tuple(slice(a, b) for a, b in pick)]
        if draw(st.booleans()):
            part = part.permute(*reversed(range(part.ndim))).contiguous()
            part = part.permute(*reversed(range(part.ndim)))
        out.append(LocalShard(part, tuple(whole.shape), tuple(a for a, _ in pick)))
    return out


@settings(max_examples=300, deadline=None)
@given(st.data(), conversions())
def test_boxes_of_shards_have_what_torch_makes_of_the_whole(data, conversion) -> None:
    tensors, rule, wanted = conversion
    spec = ConversionSpec("random", [rule], rest="refuse")
    shards = {name: cut(data.draw, whole) for name, whole in tensors.items()}
    owned = {
        part.tensor.untyped_storage().data_ptr() for parts in shards.values() for part in parts
    }
    made = {name: torch.full(t.shape, -1) for name, t in wanted.items()}
    for rank in range(max(map(len, shards.values()))):
        # a rank whose turn is over has an empty shard: it knows of the tensor, and holds nothing
        here = {
            name: parts[rank]
            if rank < len(parts)
            else LocalShard(parts[0].tensor[:0], parts[0].shape, (0,) * len(parts[0].shape))
            for name, parts in shards.items()
        }
        source = as_source(here, spec)
        assert {t.name: t.shape for t in source.manifest()} == {
            n: tuple(t.shape) for n, t in wanted.items()
        }
        for name, boxes in source.holdings().items():
            for k, box in enumerate(boxes):
                at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
                values = source.local(name, k)
                assert tuple(values.shape) == box.shape
                assert values.untyped_storage().data_ptr() in owned, "a copy was made"
                assert (made[name][at] == -1).all()
                made[name][at] = values
    for name, whole in wanted.items():
        assert torch.equal(made[name], whole), name
