from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weightsync.geometry import (
    Box,
    StridedCopy,
    affine_blocks,
    clip,
    dst_runs,
    gaps_and_overlaps,
    strided_copy,
    union,
)

moderate = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def pairs(copy: StridedCopy) -> list[tuple[int, int]]:
    """(source, destination) of every element that a copy moves, by brute force."""
    out = []
    for index in itertools.product(*(range(n) for n, _, _ in copy.dims)):
        src = copy.src_offset + sum(i * s for i, (_, s, _) in zip(index, copy.dims, strict=True))
        dst = copy.dst_offset + sum(i * d for i, (_, _, d) in zip(index, copy.dims, strict=True))
        out.append((src, dst))
    return out


def coordinates(shape: Sequence[int], address: int) -> tuple[int, ...]:
    out = []
    for n in reversed(shape):
        address, k = divmod(address, n)
        out.append(k)
    return tuple(reversed(out))


@st.composite
def boxes(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    lo = [draw(st.integers(0, n)) for n in shape]
    hi = [draw(st.integers(a, n)) for a, n in zip(lo, shape, strict=True)]
    return Box(tuple(lo), tuple(hi))


@st.composite
def copies_of(draw: st.DrawFn, shape: Sequence[int]) -> StridedCopy:
    """Any strided copy that stays within the tensor, far beyond what torch views can make."""
    numel = math.prod(shape)
    src = draw(st.integers(0, numel - 1))
    room = numel - 1 - src
    sizes, strides = [], []
    for _ in range(draw(st.integers(0, 3))):
        stride = draw(st.one_of(st.integers(0, 9), st.sampled_from([*shape, numel // shape[0]])))
        most = 4 if stride == 0 else min(12, room // stride + 1)
        n = draw(st.integers(1, most))
        room -= (n - 1) * stride
        sizes.append(n)
        strides.append(stride)
    dst_strides = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    order = draw(st.permutations(range(len(sizes))))
    copy = strided_copy(
        [sizes[k] for k in order],
        src,
        [strides[k] for k in order],
        draw(st.integers(0, 5)),
        [dst_strides[k] for k in order],
    )
    assert copy is not None
    return copy


@st.composite
def clips(draw: st.DrawFn) -> tuple[tuple[int, ...], StridedCopy, Box, Box]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    storage = draw(boxes(shape))
    inner = draw(boxes(storage.shape))
    window = Box(
        tuple(a + b for a, b in zip(storage.lo, inner.lo, strict=True)),
        tuple(a + b for a, b in zip(storage.lo, inner.hi, strict=True)),
    )
    return shape, draw(copies_of(shape)), window, storage


@moderate
@given(clips())
@example(  # steps that overlap and reach just into the next row
    ((4, 6), StridedCopy(0, 0, ((8, 2, 3), (3, 1, 1))), Box((0, 1), (4, 4)), Box((0, 1), (4, 5)))
)
def test_clip_takes_each_wanted_element_once_from_its_place_in_the_shard(
    case: tuple[tuple[int, ...], StridedCopy, Box, Box],
) -> None:
    shape, copy, window, storage = case
    expected = []
    for src, dst in pairs(copy):
        at = coordinates(shape, src)
        if all(a <= i < b for a, i, b in zip(window.lo, at, window.hi, strict=True)):
            local = 0
            for i, lo, n in zip(at, storage.lo, storage.shape, strict=True):
                local = local * n + i - lo
            expected.append((local, dst))
    parts = list(clip(copy, shape, window, storage))
    assert sorted(p for part in parts for p in pairs(part)) == sorted(expected)
    assert all(n > 1 for part in parts for n, _, _ in part.dims)


@pytest.mark.parametrize(
    ("shape", "window", "view", "parts"),
    [
        ((8, 6), Box((2, 0), (5, 6)), ([48], [1]), 1),  # a flatten, rows of it
        ((8, 6), Box((0, 2), (8, 4)), ([48], [1]), 1),  # a flatten, columns of it
        ((8, 6), Box((0, 2), (8, 4)), ([6, 8], [1, 6]), 1),  # a transpose, columns of it
        ((8, 6), Box((0, 2), (8, 4)), ([4, 2, 6], [12, 6, 1]), 1),  # an unflatten
        ((4, 8, 6), Box((1, 2, 0), (3, 6, 6)), ([192], [1]), 1),
        ((4096, 64), Box((0, 16), (4096, 32)), ([4096, 64], [64, 1]), 1),
        ((4096, 64), Box((0, 16), (4096, 32)), ([4096 * 64 - 8], [1]), 2),
    ],
)
def test_usual_views_are_not_torn_to_pieces(
    shape: tuple[int, ...], window: Box, view: tuple[list[int], list[int]], parts: int
) -> None:
    sizes, strides = view
    dst = [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]
    copy = strided_copy(sizes, 0, strides, 0, dst)
    assert copy is not None
    assert len(list(clip(copy, shape, window, window))) == parts


def test_a_scalar_and_an_empty_tensor() -> None:
    scalar = strided_copy((), 0, (), 7, ())
    assert scalar == StridedCopy(0, 7, ())
    whole = Box.whole(())
    assert list(clip(scalar, (), whole, whole)) == [scalar]
    assert whole.numel == 1
    assert strided_copy((3, 0), 0, (0, 1), 0, (0, 1)) is None
    empty = Box((0, 0), (3, 0))
    copy = strided_copy((2,), 0, (1,), 0, (1,))
    assert copy is not None
    assert list(clip(copy, (3, 4), empty, empty)) == []


@moderate
@given(st.data())
def test_minus_and_intersect_split_a_box(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = one.intersect(other)
    parts = [*one.minus(other), *([common] if common is not None else [])]
    assert sum(part.numel for part in parts) == one.numel
    for a, b in itertools.combinations(parts, 2):
        assert a.intersect(b) is None
    assert all(one.contains(part) and part.numel for part in parts)


@moderate
@given(st.data())
def test_runs_are_the_elements_that_a_copy_writes(data: st.DataObject) -> None:
    copy = data.draw(copies_of((4, 3, 5)))
    # Read the source side as a destination: strides that no permutation explains.
    copy = StridedCopy(
        0, copy.src_offset, tuple(sorted(((n, 0, s) for n, s, _ in copy.dims), key=lambda d: -d[2]))
    )
    starts, length = dst_runs(copy)
    found = [s + k for s in np.atleast_1d(np.asarray(starts)).tolist() for k in range(length)]
    assert sorted(found) == sorted(dst for _, dst in pairs(copy))


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=12)


@moderate
@given(intervals)
def test_union_gaps_and_overlaps_against_counting_bytes(case: list[tuple[int, int]]) -> None:
    starts = np.array([a for a, _ in case], dtype=np.int64)
    stops = np.array([a + n for a, n in case], dtype=np.int64)
    count = [0] * 40
    for a, n in case:
        for k in range(a, a + n):
            count[k] += 1
    merged = list(zip(*(x.tolist() for x in union(starts, stops)), strict=True))
    assert {k for a, b in merged for k in range(a, b)} == {k for k in range(40) if count[k]}
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(merged))
    gaps, overlaps = gaps_and_overlaps(starts, stops)
    used = [k for k in range(40) if count[k]]
    inner = range(used[0], used[-1]) if used else range(0)
    assert [k for a, b in gaps.tolist() for k in range(a, b)] == [k for k in inner if not count[k]]
    assert {k for a, b in overlaps.tolist() for k in range(a, b)} == {
        k for k in range(40) if count[k] > 1
    }


@moderate
@given(st.data())
def test_affine_blocks_rebuild_the_table(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    steps = [data.draw(st.integers(0, 9)) for _ in shape]
    table = sum(np.indices(shape)[k] * step for k, step in enumerate(steps)).astype(np.int64)
    dents = data.draw(st.integers(0, 3))
    for _ in range(dents):
        at = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        table[at[: data.draw(st.integers(1, len(at)))]] += data.draw(st.integers(0, 3))
    seen = np.zeros(shape, dtype=int)
    blocks = list(affine_blocks(table))
    for index, block, strides in blocks:
        for offset in itertools.product(*(range(n) for n in block)):
            at = tuple(i + k for i, k in zip(index, offset, strict=True))
            seen[at] += 1
            assert table[at] == table[index] + sum(
                k * s for k, s in zip(offset, strides, strict=True)
            )
    assert (seen == 1).all()
    if not dents:
        assert len(blocks) == 1
