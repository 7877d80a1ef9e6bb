"""Who writes what: every element of every checkpoint tensor gets exactly one rank.

Pure and deterministic: each rank computes it by itself and all get the same answer.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from weightsync.dtypes import itemsize
from weightsync.errors import ManifestError, PlanError
from weightsync.geometry import Box, StridedCopy
from weightsync.manifest import Manifest

#: What every rank holds: for each rank, the boxes of each checkpoint tensor by name.
Holdings = Sequence[Mapping[str, Sequence[Box]]]

#: (rank, index of its box, that box)
_Owner = tuple[int, int, Box]


@dataclass(frozen=True, slots=True)
class Cell:
    """Elements ``window`` of a tensor, written by ``rank`` from its shard ``box``, ``storage``."""

    window: Box
    rank: int
    box: int
    storage: Box


@dataclass(frozen=True, slots=True)
class Share:
    """Elements ``window`` of a small tensor that one rank gives to the rank that writes it whole.

    ``box`` is the giver's, which holds them.  Where one rank is both, it copies.  ``nbytes`` are
    those of the manifest's dtype.
    """

    tensor: str
    window: Box
    giver: int
    box: int
    taker: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """A small tensor that ``taker`` writes whole, as one more box behind those that it holds.

    ``itemsize`` is of the manifest's dtype; ``parts`` has what each rank gives: a window, and the
    box that it lies in.  Tensors that are held alike share it.
    """

    tensor: str
    taker: int
    itemsize: int
    parts: Mapping[int, Sequence[tuple[Box, int]]]

    def shares(self, rank: int) -> Iterator[Share]:
        """What that rank gives or takes, by giver: in the same order at both ends."""
        for giver in self.parts if rank == self.taker else (rank,):
            for window, box in self.parts.get(giver, ()):
                nbytes = window.numel * self.itemsize
                yield Share(self.tensor, window, giver, box, self.taker, nbytes)

    @property
    def moved_nbytes(self) -> int:
        """Bytes that the taker does not hold itself."""
        return self.itemsize * sum(
            window.numel
            for giver, given in self.parts.items()
            if giver != self.taker
            for window, _ in given
        )


@dataclass(frozen=True)
class Ownership:
    """Who writes what: the cells of each tensor, and the tensors that are gathered first."""

    cells: dict[str, Cells]
    gathered: list[Gathered]


class Cells:
    """The cells of one tensor: disjoint, found by address.  ``numel`` elements are held at all."""

    def __init__(self, shape: tuple[int, ...], cells: Iterable[Cell]) -> None:
        located = sorted(((_extent(shape, c.window), c) for c in cells), key=lambda pair: pair[0])
        self.shape = shape
        self.cells = [cell for _, cell in located]
        self.numel = sum(cell.window.numel for cell in self.cells)
        self._starts = [start for (start, _), _ in located]
        self._reach = list(accumulate((stop for (_, stop), _ in located), max))

    def near(self, copy: StridedCopy) -> Sequence[Cell]:
        """The cells that ``copy`` may read from, and perhaps others."""
        if len(self.cells) < 2:
            return self.cells
        last = copy.src_offset + sum((n - 1) * s for n, s, _ in copy.dims)
        first = bisect_right(self._reach, copy.src_offset)
        return self.cells[first : bisect_right(self._starts, last)]


def assign(
    manifest: Manifest,
    holdings: Holdings | None,
    wire_nbytes: Mapping[str, int],
    *,
    split_nbytes: int,
    coalesce_nbytes: int,
) -> Ownership:
    """Share the tensors of ``wire_nbytes`` out over the ranks that hold them.

    Args:
        manifest: Shapes of the tensors.
        holdings: ``None``: one rank, which holds every tensor whole.
        wire_nbytes: Bytes that will be written from each tensor, for the balance.
        split_nbytes: What several ranks hold is cut between them into parts of at least this.
        coalesce_nbytes: Tensors of at most this many bytes are written whole, by one rank that
            holds some of it; 0: by each rank what it has.

    Raises:
        ManifestError: A rank holds a tensor that the manifest does not have.
        PlanError: A box does not fit its tensor.
    """
    if holdings is None:
        whole = {name: Box.whole(manifest.by_name[name].shape) for name in wire_nbytes}
        return Ownership({n: Cells(b.hi, [Cell(b, 0, 0, b)]) for n, b in whole.items()}, [])
    held = _by_tensor(manifest, holdings)
    found: dict[str, Cells] = {}
    patterns: dict[object, _Pattern] = {}
    loads = [0] * len(holdings)
    claims: list[_Claim] = []
    for order, (name, nbytes) in enumerate(wire_nbytes.items()):
        spec = manifest.by_name[name]
        owners = held.get(name, [])
        # Most tensors of a model are held alike; what follows from that is worked out once.
        key = (spec.shape, tuple(owners))
        pattern = patterns.get(key)
        if pattern is None:
            pattern = patterns[key] = _pattern(spec.shape, _disjoint(owners))
        stored = spec.numel * itemsize(spec.dtype)
        if pattern.writers and stored <= coalesce_nbytes:
            claims.append(
                _Claim(-nbytes, order, name, pattern.parts, pattern.writers, pattern.scattered)
            )
            continue
        found[name] = pattern.own
        for rank, numel in pattern.loads:
            loads[rank] += nbytes * numel // spec.numel
        for window, several in pattern.parts:
            if len(several) > 1:
                cost = nbytes * window.numel // spec.numel
                most = window.numel * itemsize(spec.dtype) // split_nbytes
                pieces = _split(window, min(len(several), max(1, most)))
                ranks = [rank for rank, _, _ in several]
                each = -(cost // len(pieces))
                claims += [_Claim(each, order, name, [(p, several)], ranks) for p in pieces]
    return Ownership(found, _settle(claims, manifest, holdings, loads, found))


class _Claim(NamedTuple):
    """What goes to one of ``ranks`` (sorted): all ``parts``, each a box and who holds it.

    ``cost`` is negative; ``order`` and the parts' place tell apart what costs the same.  ``whole``:
    it is a whole tensor of which no rank has all, to be gathered.
    """

    cost: int
    order: int
    name: str
    parts: list[tuple[Box, list[_Owner]]]
    ranks: Sequence[int]
    whole: bool = False


def _settle(
    claims: list[_Claim],
    manifest: Manifest,
    holdings: Holdings,
    loads: list[int],
    found: dict[str, Cells],
) -> list[Gathered]:
    """Largest first, each claim goes to the rank with the least to do so far: into ``found``."""
    taken: dict[str, list[Cell]] = {}
    wholes: dict[tuple[tuple[int, ...], int, int], Cells] = {}
    known: dict[tuple[int, int], dict[int, list[tuple[Box, int]]]] = {}
    gathered: list[Gathered] = []
    for claim in sorted(claims, key=lambda c: (c.cost, c.order, c.parts[0][0].lo)):
        name, parts = claim.name, claim.parts
        rank = min(claim.ranks, key=loads.__getitem__)
        loads[rank] -= claim.cost
        if claim.whole:
            spec, key = manifest.by_name[name], (id(parts), rank)
            given = known.get(key)
            if given is None:
                given = known[key] = _given(parts, rank)
            gathered.append(Gathered(name, rank, itemsize(spec.dtype), given))
            place = (spec.shape, rank, len(holdings[rank].get(name, ())))
            if place not in wholes:
                whole = Box.whole(spec.shape)
                wholes[place] = Cells(spec.shape, [Cell(whole, rank, place[2], whole)])
            found[name] = wholes[place]
            continue
        cells = taken.setdefault(name, list(found[name].cells) if name in found else [])
        for window, owners in parts:
            cells.append(Cell(window, *next(owner for owner in owners if owner[0] == rank)))
    for name, cells in taken.items():
        found[name] = Cells(manifest.by_name[name].shape, cells)
    return gathered


def _given(
    parts: Sequence[tuple[Box, list[_Owner]]], taker: int
) -> dict[int, list[tuple[Box, int]]]:
    """What each rank gives to the taker: of a part the owner that is nearest, by number."""
    given: dict[int, list[tuple[Box, int]]] = {}
    for window, owners in parts:
        giver, box, _ = min(owners, key=lambda owner: (abs(owner[0] - taker), owner[0]))
        given.setdefault(giver, []).append((window, box))
    return given


def _by_tensor(manifest: Manifest, holdings: Holdings) -> dict[str, list[_Owner]]:
    """Who holds each tensor; every box is checked."""
    held: dict[str, list[_Owner]] = {}
    # Ranks often share boxes between tensors of one shape: by identity, holdings keep them alive.
    fine: set[tuple[int, tuple[int, ...]]] = set()
    for rank, names in enumerate(holdings):
        for name, boxes in names.items():
            spec = manifest.by_name.get(name)
            if spec is None:
                raise ManifestError(
                    f"rank {rank} holds {name!r}, which is not in the manifest",
                    hint="declare every checkpoint tensor that a rank holds, on all ranks alike",
                    rank=rank,
                    tensor=name,
                )
            owners = held.setdefault(name, [])
            for index, box in enumerate(boxes):
                key = (id(box), spec.shape)
                if key not in fine and not box.fits(spec.shape):
                    raise PlanError(
                        f"rank {rank} holds {list(box.lo)}..{list(box.hi)} of {name!r}, whose "
                        f"shape is {list(spec.shape)}",
                        hint="boxes lie within the tensor: 0 <= lo <= hi <= shape",
                        rank=rank,
                        tensor=name,
                    )
                fine.add(key)
                owners.append((rank, index, box))
    return held


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How a tensor is held.

    Attributes:
        parts: Disjoint boxes, and who holds each.
        own: What one rank alone holds, as its cells.
        loads: Those cells' ranks and elements.
        writers: Where all of it is held, and cut over several ranks: who could write it whole.
            Those that have all of it, if there are any, need nothing from the others.
        scattered: No rank has all of it.
    """

    parts: list[tuple[Box, list[_Owner]]]
    own: Cells
    loads: list[tuple[int, int]]
    writers: Sequence[int]
    scattered: bool


def _pattern(shape: tuple[int, ...], parts: list[tuple[Box, list[_Owner]]]) -> _Pattern:
    own = [Cell(window, *owners[0]) for window, owners in parts if len(owners) == 1]
    holders = Counter(rank for _, owners in parts for rank, _, _ in owners)
    writers: list[int] = []
    scattered = len(parts) not in holders.values()
    if len(parts) > 1 < len(holders) and sum(w.numel for w, _ in parts) == math.prod(shape):
        writers = sorted(r for r, n in holders.items() if scattered or n == len(parts))
    loads = [(cell.rank, cell.window.numel) for cell in own]
    return _Pattern(parts, Cells(shape, own), loads, writers, scattered)


def _disjoint(holders: Sequence[_Owner]) -> list[tuple[Box, list[_Owner]]]:
    """Disjoint boxes of what is held, each with all ranks that hold it, once a rank."""
    owners: dict[Box, dict[int, _Owner]] = {}
    for rank, index, box in holders:
        if box.numel:
            owners.setdefault(box, {}).setdefault(rank, (rank, index, box))
    if not _any_overlap(list(owners)):
        return [(box, list(held.values())) for box, held in owners.items()]
    cells: list[tuple[Box, dict[int, _Owner]]] = []
    for box, held in owners.items():
        rest = [box]
        after: list[tuple[Box, dict[int, _Owner]]] = []
        for cell, others in cells:
            common = cell.intersect(box)
            if common is None:
                after.append((cell, others))
                continue
            after += [(part, others) for part in cell.minus(common)]
            after.append((common, {**held, **others}))
            rest = [part for piece in rest for part in piece.minus(common)]
        cells = after + [(part, held) for part in rest]
    return [(box, sorted(held.values(), key=lambda owner: owner[0])) for box, held in cells]


def _any_overlap(boxes: Sequence[Box]) -> bool:
    if len(boxes) < 2:
        return False
    # Sweep along the dim that tells most boxes apart.
    dim = max(range(len(boxes[0].lo)), key=lambda k: len({box.lo[k] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.lo[dim]):
        active = [other for other in active if other.hi[dim] > box.lo[dim]]
        if any(other.intersect(box) for other in active):
            return True
        active.append(box)
    return False


def _split(box: Box, parts: int) -> list[Box]:
    """``box`` in at most ``parts`` even parts along its first dim that is longer than 1."""
    dim = next((k for k, n in enumerate(box.shape) if n > 1), None)
    if dim is None or parts < 2:
        return [box]
    lo, n = box.lo[dim], box.shape[dim]
    parts = min(parts, n)
    cuts = [lo + n * i // parts for i in range(parts + 1)]
    return [
        Box((*box.lo[:dim], a, *box.lo[dim + 1 :]), (*box.hi[:dim], b, *box.hi[dim + 1 :]))
        for a, b in pairwise(cuts)
    ]


def _extent(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """First and past-the-last address of a box in its tensor."""
    first = last = 0
    for n, lo, hi in zip(shape, box.lo, box.hi, strict=True):
        first, last = first * n + lo, last * n + hi - 1
    return first, last + 1
