"""Which elements of a tensor a rank holds: DTensor placements as boxes.  Integers only.

A mesh dim that shards a tensor's dim cuts it as ``torch.chunk`` does: into parts of equal length,
the last ones shorter or empty.  Several mesh dims on one dim cut one after the other, and a strided
shard cuts *after* the mesh dims to its right: FSDP2 over tensor parallelism.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from weightsync.errors import InputError
from weightsync.geometry import Box

#: ``start <= index < stop``
Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """One mesh dim's placement: it shards ``dim``; ``strided`` is the split factor, or 0.

    ``parts`` and ``index`` are the mesh dim's size and this rank's place in it.
    """

    dim: int
    parts: int
    index: int
    strided: int = 0


def local_boxes(
    shape: Sequence[int], cuts: Sequence[Cut], local_shape: Sequence[int], *, name: str
) -> list[tuple[Box, Box]]:
    """What one rank holds of a tensor.

    Args:
        shape: Of the whole tensor.
        cuts: Its sharding mesh dims, in the mesh's order.
        local_shape: Of the rank's local tensor; padding is no part of it.
        name: For messages.

    Returns:
        Disjoint boxes of the tensor with elements, each with the box of the local tensor that has
        its values.

    Raises:
        InputError: The local tensor has not the shape that the placements say, or an uneven
            strided shard can be read in two ways.
    """
    by_dim: list[list[Interval]] = []
    for dim, size in enumerate(shape):
        here = [cut for cut in cuts if cut.dim == dim]
        fitting = [
            reading
            for reading in (_as_nested(size, here), _as_applied(size, here))
            if len(local_shape) == len(shape) and _length(reading) == local_shape[dim]
        ]
        if not fitting:
            raise InputError(
                f"{name!r}: the local tensor has shape {list(local_shape)}, which is not what its "
                f"placements make of {list(shape)}",
                hint="make the DTensor with the shape of the whole tensor",
                tensor=name,
            )
        if fitting[0] != fitting[-1]:
            raise InputError(
                f"{name!r}: dim {dim} of {list(shape)} is sharded unevenly by strided shards, and "
                "which rows this rank has cannot be told",
                hint="choose mesh sizes that divide that dim evenly",
                tensor=name,
            )
        by_dim.append(fitting[0])
    if not math.prod(local_shape):
        return []
    return list(_products(by_dim))


def chunk(size: int, parts: int, index: int) -> Interval:
    """The part ``index`` of ``parts`` that ``torch.chunk`` makes of ``size``; may be empty."""
    step = -(-size // parts)
    return min(index * step, size), min((index + 1) * step, size)


def _as_nested(size: int, cuts: Sequence[Cut]) -> list[Interval]:
    """As FSDP2 shards what is sharded already: the strided cut comes last."""
    strided = [k for k, cut in enumerate(cuts) if cut.strided]
    if len(strided) == 1:
        (k,) = strided
        right = cuts[k + 1 :]
        if cuts[k].strided == math.prod(cut.parts for cut in right):
            cuts = [*cuts[:k], *right, replace(cuts[k], strided=0)]
    if any(cut.strided for cut in cuts):
        return _as_applied(size, cuts)
    held = [(0, size)]
    for cut in cuts:
        held = _select(held, *chunk(_length(held), cut.parts, cut.index))
    return _merged(held)


def _as_applied(size: int, cuts: Sequence[Cut]) -> list[Interval]:
    """As DTensor defines it: left to right, a strided cut takes its part of each of its pieces."""
    held = [(0, size)]
    for cut in cuts:
        length = _length(held)
        taken: list[Interval] = []
        for piece in range(cut.strided or 1):
            start, stop = chunk(length, cut.strided or 1, piece)
            first, last = chunk(stop - start, cut.parts, cut.index)
            taken += _select(held, start + first, start + last)
        held = taken
    return _merged(held)


def _length(intervals: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


def _select(intervals: Sequence[Interval], first: int, last: int) -> list[Interval]:
    """The elements ``first`` to ``last`` of intervals laid end to end."""
    out, at = [], 0
    for start, stop in intervals:
        lo, hi = max(first - at, 0), min(last - at, stop - start)
        if lo < hi:
            out.append((start + lo, start + hi))
        at += stop - start
    return out


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    out: list[Interval] = []
    for start, stop in intervals:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def _products(by_dim: Sequence[Sequence[Interval]]) -> Iterator[tuple[Box, Box]]:
    located: list[list[tuple[Interval, Interval]]] = []
    for intervals in by_dim:
        ends = list(itertools.accumulate(b - a for a, b in intervals))
        located.append(
            [((a, b), (end - (b - a), end)) for (a, b), end in zip(intervals, ends, strict=True)]
        )
    for pick in itertools.product(*located):
        yield _box([whole for whole, _ in pick]), _box([local for _, local in pick])


def _box(intervals: Sequence[Interval]) -> Box:
    return Box(tuple(a for a, _ in intervals), tuple(b for _, b in intervals))
