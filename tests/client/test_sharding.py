"""Boxes of a shard against what torch itself puts on that rank; no processes."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightsync.errors import InputError
from weightsync.geometry import Box
from weightsync_client.sharding import Cut, chunk, local_boxes


def cuts_of(placements, mesh, coordinate) -> list[Cut]:
    return [
        Cut(p.dim, n, i, getattr(p, "split_factor", None) or 0)
        for p, n, i in zip(placements, mesh, coordinate, strict=True)
        if not isinstance(p, Replicate)
    ]


def torchs_shard(whole: torch.Tensor, placements, mesh, coordinate) -> torch.Tensor:
    """Left to right, each placement by torch's own splitting: what distribute_tensor makes."""
    for p, n, i in zip(placements, mesh, coordinate, strict=True):
        if not isinstance(p, Replicate):
            whole = p._split_tensor(whole, n, with_padding=False)[0][i]
    return whole


def fsdps_shard(whole: torch.Tensor, placements, mesh, coordinate) -> torch.Tensor:
    """What FSDP2 does with a tensor that is sharded already: the strided chunk comes last."""
    last = [isinstance(p, _StridedShard) for p in placements]
    for late in (False, True):
        for p, n, i, strided in zip(placements, mesh, coordinate, last, strict=True):
            if not isinstance(p, Replicate) and strided == late:
                parts = list(torch.chunk(whole, n, p.dim))
                parts += [whole.narrow(p.dim, 0, 0)] * (n - len(parts))
                whole = parts[i]
    return whole


def assert_holds(whole: torch.Tensor, local: torch.Tensor, cuts: list[Cut]) -> torch.Tensor:
    """The boxes have the local values; returns which elements they are."""
    held = torch.zeros(whole.shape, dtype=torch.int64)
    for box, inner in local_boxes(whole.shape, cuts, local.shape, name="w"):
        at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
        here = tuple(slice(a, b) for a, b in zip(inner.lo, inner.hi, strict=True))
        assert torch.equal(whole[at], local[here])
        assert box.numel > 0
        held[at] += 1
    assert held.sum() == local.numel()
    return held


shapes = st.lists(st.integers(0, 13), min_size=1, max_size=3).map(tuple)
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def plain_placements(draw, ndim: int, axes: int):
    choice = st.one_of(st.just(Replicate()), st.integers(0, ndim - 1).map(Shard))
    return [draw(choice) for _ in range(axes)]


@given(st.data(), shapes, meshes)
def test_plain_shards_tile_the_tensor_as_torch_cuts_it(data, shape, mesh) -> None:
    """Uneven and empty shards, several mesh dims on one dim, replicas."""
    placements = data.draw(plain_placements(len(shape), len(mesh)))
    whole = torch.arange(math.prod(shape)).reshape(shape)
    total = torch.zeros(shape, dtype=torch.int64)
    for coordinate in product(*map(range, mesh)):
        local = torchs_shard(whole, placements, mesh, coordinate)
        total += assert_holds(whole, local, cuts_of(placements, mesh, coordinate))
    replicas = math.prod(n for n, p in zip(mesh, placements, strict=True) if p == Replicate())
    assert (total == replicas).all()


@given(st.data(), shapes, st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)))
def test_fsdp_over_tensor_parallel_tiles_the_tensor_or_is_refused(data, shape, mesh) -> None:
    """HSDP x FSDP x TP on one dim: refused only where the dim is cut unevenly."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    tp = mesh[2]
    placements = [Replicate(), _StridedShard(dim, split_factor=tp), Shard(dim)]
    whole = torch.arange(math.prod(shape)).reshape(shape)
    total = torch.zeros(shape, dtype=torch.int64)
    for coordinate in product(*map(range, mesh)):
        local = fsdps_shard(whole, placements, mesh, coordinate)
        try:
            held = assert_holds(whole, local, cuts_of(placements, mesh, coordinate))
        except InputError:
            assert shape[dim] % tp
            return
        total += held
    assert (total == mesh[0]).all()


@given(shapes, st.integers(2, 4), st.integers(2, 4), st.data())
def test_a_strided_shard_alone_has_the_boxes_that_torch_gives_it(shape, n, factor, data) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    placement = _StridedShard(dim, split_factor=factor)
    whole = torch.arange(math.prod(shape)).reshape(shape)
    total = torch.zeros(shape, dtype=torch.int64)
    for index in range(n):
        local = torchs_shard(whole, [placement], (n,), (index,))
        total += assert_holds(whole, local, cuts_of([placement], (n,), (index,)))
    assert (total == 1).all()


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunk_is_torchs(size: int, parts: int) -> None:
    made = [len(c) for c in torch.arange(size).chunk(parts)] if size else [0]
    made += [0] * (parts - len(made))
    assert [b - a for a, b in (chunk(size, parts, i) for i in range(parts))] == made


def test_an_even_strided_shard_is_one_box() -> None:
    cuts = [Cut(0, 2, 1, strided=2), Cut(0, 2, 0)]
    assert local_boxes((8, 3), cuts, (2, 3), name="w") == [
        (Box((2, 0), (4, 3)), Box((0, 0), (2, 3)))
    ]


def test_a_local_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"'w': the local tensor has shape \[3, 3\]"):
        local_boxes((8, 3), [Cut(0, 2, 0)], (3, 3), name="w")
    with pytest.raises(InputError, match="'w': the local tensor"):
        local_boxes((8, 3), [Cut(0, 2, 0)], (4,), name="w")


def test_an_uneven_strided_shard_that_can_be_read_in_two_ways_is_refused() -> None:
    """27 rows over 4 of tensor parallelism, those over 3 of FSDP: row 20, or row 26."""
    cuts = [Cut(0, 3, 2, strided=4), Cut(0, 4, 2)]
    with pytest.raises(InputError, match="which rows this rank has cannot be told"):
        local_boxes((27,), cuts, (1,), name="w")
