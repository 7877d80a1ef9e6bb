"""Which bytes of a kernel tensor a traced load covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from weightsync.geometry import Int64s, dst_runs, gaps_and_overlaps, strided_copy, union
from weightsync_server.receiver.regions import Strided, TracedCopy

_EMPTY: Int64s = np.zeros(0, dtype=np.int64)


def intervals(regions: Iterable[Strided]) -> tuple[Int64s, Int64s]:
    """Sorted disjoint element intervals (starts, stops) that strided regions cover together."""
    starts, stops = [_EMPTY], [_EMPTY]
    for region in regions:
        copy = strided_copy(
            region.shape, 0, (0,) * len(region.shape), region.offset, region.strides
        )
        if copy is None:
            continue
        first, length = dst_runs(copy)
        at = np.atleast_1d(np.asarray(first, dtype=np.int64))
        starts.append(at)
        stops.append(at + length)
    return union(np.concatenate(starts), np.concatenate(stops))


def complement(covered: tuple[Int64s, Int64s], numel: int) -> list[tuple[int, int]]:
    """Element intervals of ``[0, numel)`` outside sorted disjoint ``covered``."""
    starts = np.concatenate((covered[0], [numel]))
    stops = np.concatenate(([0], covered[1]))
    return [(int(a), int(b)) for a, b in zip(stops, starts, strict=True) if a < b]


def within(inner: Sequence[tuple[int, int]], outer: tuple[Int64s, Int64s]) -> bool:
    """Whether every interval of ``inner`` lies in the union of sorted disjoint ``outer``."""
    starts, stops = outer
    for a, b in inner:
        k = int(np.searchsorted(starts, a, side="right")) - 1
        if k < 0 or stops[k] < b:
            return False
    return True


def overlap(a: tuple[Int64s, Int64s], b: tuple[Int64s, Int64s]) -> bool:
    """Whether two sets of sorted disjoint intervals share an element."""
    _, twice = gaps_and_overlaps(np.concatenate((a[0], b[0])), np.concatenate((a[1], b[1])))
    return bool(len(twice))


def last_write_wins(copies: Sequence[TracedCopy]) -> list[TracedCopy]:
    """Drop copies that a later one overwrites whole, as a load in that order leaves it.

    Copies that overlap in part stay, and fail the coverage proof.
    """
    starts, stops = [_EMPTY], [_EMPTY]
    for c in copies:
        one = intervals([c.dst])
        starts.append(one[0])
        stops.append(one[1])
    _, twice = gaps_and_overlaps(np.concatenate(starts), np.concatenate(stops))
    if not len(twice):
        return list(copies)
    final: dict[object, TracedCopy] = {}
    for c in copies:
        # one key for all spellings of the same elements; what stays keeps the loader's order
        zeros = (0,) * len(c.dst.shape)
        key = strided_copy(c.dst.shape, 0, zeros, c.dst.offset, c.dst.strides)
        final.pop(key, None)
        final[key] = c
    return list(final.values())
