"""Boxes, strided copies and byte intervals: integers only, no tensors.

A checkpoint tensor is seen as contiguous (row-major).  Offsets and strides are elements and never
negative; intervals are half open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

#: one dim of a strided copy: (size, source stride, destination stride)
Dim = tuple[int, int, int]
#: a part of a copy: source offset, destination offset, dims
_Part = tuple[int, int, tuple[Dim, ...]]


@dataclass(frozen=True, slots=True)
class Box:
    """The part ``lo[k] <= index[k] < hi[k]`` of a tensor.

    As a shard it has storage of its own: contiguous, of shape ``hi - lo``.
    """

    lo: tuple[int, ...]
    hi: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent in every dim."""
        return tuple(stop - start for start, stop in zip(self.lo, self.hi, strict=True))

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this is a box of a tensor of that shape."""
        return len(self.lo) == len(self.hi) == len(shape) and all(
            0 <= start <= stop <= n for start, stop, n in zip(self.lo, self.hi, shape, strict=True)
        )

    def contains(self, other: Box) -> bool:
        """Whether every element of ``other`` is in this box."""
        return all(a <= b for a, b in zip(self.lo, other.lo, strict=True)) and all(
            a >= b for a, b in zip(self.hi, other.hi, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The common part; ``None`` if it has no elements."""
        lo = tuple(map(max, self.lo, other.lo))
        hi = tuple(map(min, self.hi, other.hi))
        return Box(lo, hi) if all(a < b for a, b in zip(lo, hi, strict=True)) else None

    def minus(self, other: Box) -> list[Box]:
        """Disjoint boxes of the elements that are not in ``other``."""
        common = self.intersect(other)
        if common is None:
            return [self] if self.numel else []
        rest: list[Box] = []
        lo, hi = list(self.lo), list(self.hi)
        for k, (a, b) in enumerate(zip(common.lo, common.hi, strict=True)):
            if lo[k] < a:
                rest.append(Box(tuple(lo), (*hi[:k], a, *hi[k + 1 :])))
            if b < hi[k]:
                rest.append(Box((*lo[:k], b, *lo[k + 1 :]), tuple(hi)))
            lo[k], hi[k] = a, b
        return rest


class StridedCopy(NamedTuple):
    """Element ``i`` of the source goes to element ``i`` of the destination.

    ``dims`` have sizes above 1, are sorted by destination stride, largest first, and are as few
    as possible.
    """

    src_offset: int
    dst_offset: int
    dims: tuple[Dim, ...]

    @property
    def numel(self) -> int:
        """Elements that are copied."""
        return math.prod(n for n, _, _ in self.dims)

    @property
    def dst_span(self) -> int:
        """Distance from the first to the last element in the destination."""
        return sum((n - 1) * d for n, _, d in self.dims)


def strided_copy(
    shape: Sequence[int],
    src_offset: int,
    src_strides: Sequence[int],
    dst_offset: int,
    dst_strides: Sequence[int],
) -> StridedCopy | None:
    """A copy in its shortest form; ``None`` if it has no elements."""
    if 0 in shape:
        return None
    dims = zip(shape, src_strides, dst_strides, strict=True)
    return StridedCopy(src_offset, dst_offset, _shorten(dims))


def _shorten(dims: Iterable[Dim]) -> tuple[Dim, ...]:
    """Sort by destination stride and merge dims that are one in source and destination."""
    ordered = sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: (-dim[2], -dim[1]))
    out: list[Dim] = []
    for n, s, d in ordered:
        if out and out[-1][1] == n * s and out[-1][2] == n * d:
            out[-1] = (out[-1][0] * n, s, d)
        else:
            out.append((n, s, d))
    return tuple(out)


# ------------------------------------------------------------------ cutting a copy by a box


class _Level(NamedTuple):
    """One dim of the tensor while a copy is cut.

    A step in it is ``row`` elements of the tensor and ``local_row`` of the storage box, which
    begins at ``base``; the window is ``lo <= index < hi``.
    """

    row: int
    local_row: int
    base: int
    lo: int
    hi: int


def clip(
    copy: StridedCopy, tensor_shape: Sequence[int], window: Box, storage: Box
) -> Iterator[StridedCopy]:
    """The part of ``copy`` whose source lies in ``window``, read from the shard ``storage``.

    Args:
        copy: Reads a tensor of shape ``tensor_shape``, contiguous.
        tensor_shape: Shape of that tensor.
        window: The elements that are wanted.
        storage: A box that contains the window.

    Yields:
        Copies whose source offset and strides count in the contiguous storage of ``storage``, and
        whose destination is that of ``copy``.  Each wanted element is in exactly one of them.
    """
    if not window.numel:
        return
    levels = _levels(tensor_shape, window, storage)
    for src, dst, dims in _cut(levels, copy.src_offset, copy.dst_offset, copy.dims):
        yield StridedCopy(src, dst, _shorten(dims))


def clip_dst(copy: StridedCopy, lo: int, hi: int) -> Iterator[StridedCopy]:
    """The part of ``copy`` whose destination address is in ``[lo, hi)``."""
    turned = tuple((n, d, s) for n, s, d in copy.dims)
    for dst, src, dims in _clip_line(copy.dst_offset, copy.src_offset, turned, lo, hi):
        yield StridedCopy(src, dst, _shorten((n, s, d) for n, d, s in dims))


def _levels(tensor_shape: Sequence[int], window: Box, storage: Box) -> list[_Level]:
    """The tensor's dims, where a dim that both boxes span is merged into the one before it."""
    sizes: list[list[int]] = [[1, 0, 1, 0, 1]]  # size, window lo and hi, storage lo and hi
    for k, n in enumerate(tensor_shape):
        dim = [n, window.lo[k], window.hi[k], storage.lo[k], storage.hi[k]]
        if dim == [n, 0, n, 0, n]:
            sizes[-1] = [n * bound for bound in sizes[-1]]
        else:
            sizes.append(dim)
    if len(sizes) > 1 and sizes[0][0] == 1:
        del sizes[0]  # the seed, where nothing was merged into it
    levels: list[_Level] = []
    row = local_row = 1
    for n, lo, hi, base, end in reversed(sizes):
        levels.append(_Level(row, local_row, base, lo, hi))
        row, local_row = row * n, local_row * (end - base)
    return levels[::-1]


def _cut(levels: Sequence[_Level], src: int, dst: int, dims: tuple[Dim, ...]) -> Iterator[_Part]:
    level, inner = levels[0], levels[1:]
    if not inner:
        for at, to, kept in _clip_line(src, dst, dims, level.lo, level.hi):
            yield at - level.base, to, kept
        return
    for start, begin, outer_dims, inner_dims in _split_rows(src, dst, dims, level.row):
        rows = tuple((n, s // level.row, d) for n, s, d in outer_dims)
        for row, to, kept in _clip_line(start // level.row, begin, rows, level.lo, level.hi):
            local = (row - level.base) * level.local_row
            scaled = tuple((n, s * level.local_row, d) for n, s, d in kept)
            for at, end, rest in _cut(inner, start % level.row, to, inner_dims):
                yield local + at, end, scaled + rest


def _clip_line(src: int, dst: int, dims: tuple[Dim, ...], lo: int, hi: int) -> Iterator[_Part]:
    """The part of a copy whose source address is in ``[lo, hi)``."""
    span = sum((n - 1) * s for n, s, _ in dims)
    if lo <= src and src + span < hi:
        yield src, dst, dims
        return
    if src + span < lo or hi <= src:
        return
    # The span is not 0 here, so some dim has size and stride: cut the one with the longest stride.
    (n, s, d), inner = _take_longest(dims)
    span -= (n - 1) * s
    first = max(0, -((src + span - lo) // s))
    stop = min(n, (hi - 1 - src) // s + 1)
    whole = max(first, -((src - lo) // s))
    whole_stop = min(stop, (hi - 1 - span - src) // s + 1)
    if whole < whole_stop:
        yield src + whole * s, dst + whole * d, ((whole_stop - whole, s, d), *inner)
    else:
        whole = whole_stop = stop
    for i in (*range(first, whole), *range(whole_stop, stop)):
        yield from _clip_line(src + i * s, dst + i * d, inner, lo, hi)


def _split_rows(
    src: int, dst: int, dims: tuple[Dim, ...], row: int
) -> Iterator[tuple[int, int, tuple[Dim, ...], tuple[Dim, ...]]]:
    """Parts of a copy in which no step carries from one row of ``row`` elements into the next.

    Yields:
        Source and destination offset, the dims that step whole rows, the dims that stay in a row.
    """
    outer = tuple(dim for dim in dims if dim[1] and dim[1] % row == 0)
    rest = tuple(dim for dim in dims if not dim[1] or dim[1] % row)
    span = sum((n - 1) * s for n, s, _ in rest)
    column = src % row
    if column + span < row:
        yield src, dst, outer, rest
        return
    (n, s, d), inner = _take_longest(rest)
    span -= (n - 1) * s
    inner += outer
    if s < row and row % s == 0:
        # The dim runs through whole rows (a flatten): head, then rows x columns, then tail.
        per_row = row // s
        head = 0 if column < s else -((column - row) // s)
        rows = (n - head) // per_row
        if rows > 0 and (column + head * s) % row + span < s:
            tail = head + rows * per_row
            if head:
                yield from _split_rows(src, dst, ((head, s, d), *inner), row)
            body = ((rows, row, per_row * d), (per_row, s, d), *inner)
            yield from _split_rows(src + head * s, dst + head * d, body, row)
            if tail < n:
                yield from _split_rows(
                    src + tail * s, dst + tail * d, ((n - tail, s, d), *inner), row
                )
            return
    i = 0
    while i < n:  # as many steps at a time as stay in one row
        at, to = src + i * s, dst + i * d
        steps = min(n - i, max(0, row - 1 - at % row - span) // s + 1)
        if at % row + span < row:
            yield from _split_rows(at, to, ((steps, s, d), *inner), row)
        else:
            steps = 1
            yield from _split_rows(at, to, inner, row)
        i += steps


def _take_longest(dims: tuple[Dim, ...]) -> tuple[Dim, tuple[Dim, ...]]:
    k = max(range(len(dims)), key=lambda i: dims[i][1] if dims[i][0] > 1 else 0)
    return dims[k], dims[:k] + dims[k + 1 :]


# ------------------------------------------------------------------ intervals


def dst_runs(copy: StridedCopy) -> tuple[Int64s | int, int]:
    """The contiguous runs that a copy writes.

    Returns:
        The runs' first elements (an int where there is one run) and their common length.  A copy
        that writes an element twice has runs that overlap.
    """
    length, k = 1, len(copy.dims)
    while k and copy.dims[k - 1][2] == length:
        k -= 1
        length *= copy.dims[k][0]
    if not k:
        return copy.dst_offset, length
    return grid(copy.dst_offset, [(n, d) for n, _, d in copy.dims[:k]]).ravel(), length


def grid(start: int, dims: Sequence[tuple[int, int]]) -> Int64s:
    """``start + sum(i*stride)`` for every index; ``dims`` are (size, stride)."""
    out = np.full((1,) * len(dims), start, dtype=np.int64)
    for k, (n, stride) in enumerate(dims):
        steps = np.arange(n, dtype=np.int64) * stride
        out = out + steps.reshape((n,) + (1,) * (len(dims) - k - 1))
    return out


def union(starts: Int64s, stops: Int64s) -> tuple[Int64s, Int64s]:
    """Sorted, with intervals that touch or overlap merged."""
    if not len(starts):
        return starts, stops
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    first = np.concatenate(([True], starts[1:] > stops[:-1]))
    return starts[first], stops[np.concatenate((first[1:], [True]))]


def gaps_and_overlaps(starts: Int64s, stops: Int64s) -> tuple[Int64s, Int64s]:
    """What keeps intervals from laying end to end.

    Returns:
        Two arrays of shape (k, 2): the gaps between the intervals, and bytes that lie in more
        than one of them (of each later interval, the part that an earlier one has).
    """
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    reach = np.maximum.accumulate(stops)
    gap = starts[1:] > reach[:-1]
    twice = starts[1:] < np.minimum(reach[:-1], stops[1:])
    return (
        np.stack((reach[:-1][gap], starts[1:][gap]), axis=1),
        np.stack((starts[1:][twice], np.minimum(reach[:-1], stops[1:])[twice]), axis=1),
    )


def affine_blocks(
    values: Int64s,
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Blocks of a table in which the value is affine in the indices.

    Yields:
        First index, shape, and the value's step in every dim.  The blocks cover the table once.
    """
    if values.ndim == 0:
        yield (), (), ()
        return
    heads = values.reshape(len(values), -1)[:, 0]
    relative = (values - heads.reshape((-1,) + (1,) * (values.ndim - 1))).reshape(len(values), -1)
    alike = (relative[1:] == relative[:-1]).all(axis=1)
    steps = np.diff(heads)
    # Row j joins the block of row i < j while the rows are alike and the heads' step is the same.
    breaks = np.flatnonzero(~(alike[1:] & alike[:-1] & (steps[1:] == steps[:-1]))) + 1
    i = 0
    while i < len(values):
        j = i + 1
        if j < len(values) and alike[i]:
            k = int(np.searchsorted(breaks, i + 1))
            j = int(breaks[k]) + 1 if k < len(breaks) else len(values)
        step = int(steps[i]) if j > i + 1 else 0
        for index, shape, strides in affine_blocks(values[i]):
            yield (i, *index), (j - i, *shape), (step, *strides)
        i = j
