from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync.coverage import check_writes
from weightsync.errors import ManifestError, PlanError
from weightsync.geometry import Box
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace
from weightsync.lending import Lendable, Place
from weightsync.manifest import Manifest, TensorSpec
from weightsync.plan import Holdings, Job, Round, TransportPlan, build_plan, build_plans

moderate = settings(max_examples=400, deadline=None, derandomize=True, database=None)
STEPS = ["narrow", "chunk", "transpose", "unbind", "reshape", "flatten", "expand", "select"]
DTYPES = ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn"]


@dataclasses.dataclass
class World:
    checkpoint: dict[str, torch.Tensor]
    layouts: list[WorkerLayout]
    holdings: Holdings | None
    split_nbytes: int = 8
    max_slot_nbytes: int | None = None
    coalesce_nbytes: int = 0
    #: what ranks lend, and the least run of it
    lendable: list[Lendable] | None = None
    lend_nbytes: int = 1

    @property
    def manifest(self) -> Manifest:
        return Manifest.of(
            TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in self.checkpoint.items()
        )

    def plans(self) -> list[TransportPlan]:
        if self.lendable is not None:
            job = Job.of(
                self.manifest,
                self.layouts,
                self.holdings,
                split_nbytes=self.split_nbytes,
                coalesce_nbytes=self.coalesce_nbytes,
                allow_skipped=["*"],
            )
            return [
                job.plan(
                    rank,
                    max_slot_nbytes=self.max_slot_nbytes,
                    lendable=lendable,
                    lend_nbytes=self.lend_nbytes,
                )
                for rank, lendable in enumerate(self.lendable)
            ]
        return build_plans(
            self.manifest,
            self.layouts,
            self.holdings,
            split_nbytes=self.split_nbytes,
            max_slot_nbytes=self.max_slot_nbytes,
            coalesce_nbytes=self.coalesce_nbytes,
            allow_skipped=["*"],
        )

    def shard(self, rank: int, tensor: str, box: int) -> torch.Tensor:
        """A rank's own values, contiguous."""
        if self.holdings is None:
            return self.checkpoint[tensor]
        return cut(self.checkpoint[tensor], self.holdings[rank][tensor][box])


def cut(values: torch.Tensor, box: Box) -> torch.Tensor:
    return values[slices(box)].clone(memory_format=torch.contiguous_format)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))


def exchange(world: World, plans: Sequence[TransportPlan]) -> dict[tuple[int, str], torch.Tensor]:
    """What ranks have of others once every share is given: whole tensors, by rank and name."""
    whole: dict[tuple[int, str], torch.Tensor] = {}
    count: dict[tuple[int, str], torch.Tensor] = {}
    pairs = {(s.giver, s.taker) for plan in plans for s in plan.shares}
    for giver, taker in pairs:
        given = [s for s in plans[giver].shares if s.taker == taker and s.giver == giver]
        assert given == [s for s in plans[taker].shares if s.giver == giver and s.taker == taker]
        for share in given:
            tensor = world.checkpoint[share.tensor]
            assert tensor.nbytes <= world.coalesce_nbytes
            key = (taker, share.tensor)
            here = whole.setdefault(key, torch.full_like(tensor, 77))
            times = count.setdefault(key, torch.zeros(tensor.shape))
            index = tuple(
                slice(a, b) for a, b in zip(share.window.lo, share.window.hi, strict=True)
            )
            held = world.holdings[giver][share.tensor][share.box]
            assert held.contains(share.window)
            here[index] = tensor[index]
            times[index] += 1
            assert share.nbytes == tensor[index].nbytes
    assert all((times == 1).all() for times in count.values())
    return whole


def fresh(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), 0x5A, dtype=torch.uint8)


def strided(
    memory: torch.Tensor, dtype: str, shape: Sequence[int], strides: Sequence[int], offset: int
) -> torch.Tensor:
    return memory.view(getattr(torch, dtype)).as_strided(shape, strides, offset)


def load(world: World, layout: WorkerLayout) -> list[torch.Tensor]:
    """What the engine's loader would make: every record as a copy from the whole tensor."""
    memory = [fresh(region.nbytes) for region in layout.regions]
    for r in layout.records:
        if 0 not in r.shape:
            dtype = layout.regions[r.region].dtype
            source = world.checkpoint[r.tensor].as_strided(r.shape, r.src_strides, r.src_offset)
            strided(memory[r.region], dtype, r.shape, r.dst_strides, r.dst_offset).copy_(source)
    return memory


def fill_slots(
    world: World, rank: int, part: Round, slot: torch.Tensor, whole: dict[Any, torch.Tensor]
) -> None:
    for fill in part.fills:
        if world.holdings is not None and fill.box == len(world.holdings[rank][fill.tensor]):
            shard = whole[rank, fill.tensor]
        else:
            shard = world.shard(rank, fill.tensor, fill.box)
        itemsize = getattr(torch, fill.dtype).itemsize
        assert fill.slot_offset % itemsize == 0
        target = strided(
            slot, fill.dtype, fill.shape, fill.slot_strides, fill.slot_offset // itemsize
        )
        target.copy_(shard.as_strided(fill.shape, fill.src_strides, fill.src_offset))


def memory_of(world: World, plan: TransportPlan) -> torch.Tensor:
    """A rank's slots, and behind them the blocks that it lends."""
    if world.lendable is None:
        return torch.full((plan.slot_nbytes,), 0xEE, dtype=torch.uint8)
    lendable = world.lendable[plan.rank]
    memory = torch.full((plan.origins[-1],), 0xEE, dtype=torch.uint8)
    for (tensor, box), place in lendable.places.items():
        at = plan.origins[place.block] + place.offset
        values = world.shard(plan.rank, tensor, box).reshape(-1).view(torch.uint8)
        memory[at : at + values.numel()] = values
    return memory


def push(world: World, plans: Sequence[TransportPlan]) -> None:
    """Fill, write, count; every worker's memory is then compared with what a load makes."""
    memory = [[fresh(r.nbytes) for r in layout.regions] for layout in world.layouts]
    count = [[torch.zeros_like(m) for m in regions] for regions in memory]
    whole = exchange(world, plans)
    for plan in plans:
        if world.max_slot_nbytes is not None:
            assert plan.slot_nbytes <= world.max_slot_nbytes
        slot = memory_of(world, plan)
        for k, (this, after) in enumerate(
            itertools.zip_longest(plan.rounds, plan.rounds[1:], fillvalue=None)
        ):
            if k == 0:
                fill_slots(world, plan.rank, this, slot, whole)
            if after is not None:  # the next round is filled while this one is on the wire
                fill_slots(world, plan.rank, after, slot, whole)
            for w, writes in enumerate(this.writes):
                for write in writes:
                    if write.slot_offset < plan.slot_nbytes:
                        assert write.slot_offset % 64 == 0
                    here = slice(write.offset, write.offset + write.nbytes)
                    there = slice(write.slot_offset, write.slot_offset + write.nbytes)
                    memory[w][write.region][here] = slot[there]
                    count[w][write.region][here] += 1
    for w, layout in enumerate(world.layouts):
        check_writes(layout, {plan.rank: plan.declared(w) for plan in plans})
        for k, (region, expected) in enumerate(
            zip(layout.regions, load(world, layout), strict=True)
        ):
            wanted = torch.ones_like(expected)
            for start, stop in region.untouched:
                wanted[start:stop] = 0
            assert torch.equal(count[w][k], wanted)
            assert torch.equal(memory[w][k], expected)


# ------------------------------------------------------------------ random worlds


@st.composite
def views(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    """A chain of what loaders do before they copy."""
    view = tensor
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(STEPS))
        dim = draw(st.integers(0, max(0, view.dim() - 1)))
        if kind == "reshape":
            numel = view.numel()
            n = draw(st.sampled_from([k for k in range(1, numel + 1) if numel % k == 0]))
            shape = draw(st.sampled_from([(n, numel // n), (1, n, numel // n), (numel,)]))
            try:
                view = view.view(shape)
            except RuntimeError:
                view = view.transpose(0, -1) if view.dim() else view
        elif not view.dim():
            continue
        elif kind == "narrow":
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif kind == "chunk":
            view = draw(st.sampled_from(view.chunk(draw(st.integers(1, 3)), dim)))
        elif kind == "transpose":
            view = view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
        elif kind == "unbind":
            view = draw(st.sampled_from(view.unbind(dim)))
        elif kind == "select":
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
        elif kind == "flatten" and view.is_contiguous():
            view = view.flatten()
        elif kind == "expand" and view.numel() <= 200:
            view = view.unsqueeze(dim)
            view = view.expand([3 if k == dim else n for k, n in enumerate(view.shape)])
    return view


@st.composite
def regions(
    draw: st.DrawFn, checkpoint: dict[str, torch.Tensor], index: int
) -> tuple[KernelRegion, list[CopyRecord]]:
    """A kernel tensor: views of one size side by side along some dim, and padding."""
    name = draw(st.sampled_from(sorted(checkpoint)))
    first = draw(views(checkpoint[name]))
    parts = [(name, first)]
    for other, tensor in checkpoint.items():
        if tensor.shape == checkpoint[name].shape and draw(st.booleans()):
            parts.append(
                (other, tensor.as_strided(first.shape, first.stride(), first.storage_offset()))
            )
    order = draw(st.permutations(range(first.dim())))
    block = [first.shape[k] for k in order] or [1]
    dim = draw(st.integers(0, len(block) - 1))
    padding = draw(st.integers(0, 2))
    shape = list(block)
    shape[dim] = block[dim] * len(parts) + padding
    dtype = draw(st.sampled_from(DTYPES))
    parameter = torch.empty(shape, dtype=getattr(torch, dtype))
    records = []
    for k, (tensor, source) in enumerate(draw(st.permutations(parts))):
        target = parameter.narrow(dim, k * block[dim], block[dim])
        target = target.permute([order.index(j) for j in range(len(order))]) if order else target[0]
        records.append(
            CopyRecord(
                tensor,
                tuple(source.shape),
                source.storage_offset(),
                tuple(source.stride()),
                index,
                target.storage_offset(),
                tuple(target.stride()),
            )
        )
    itemsize = parameter.element_size()
    rest = parameter.narrow(dim, shape[dim] - padding, padding)
    pad = sorted(
        k
        for k in torch.arange(parameter.numel())
        .as_strided(rest.shape, rest.stride(), rest.storage_offset())
        .flatten()
        .tolist()
    )
    untouched: list[tuple[int, int]] = []
    for k in pad:
        if untouched and untouched[-1][1] == k * itemsize:
            untouched[-1] = (untouched[-1][0], (k + 1) * itemsize)
        else:
            untouched.append((k * itemsize, (k + 1) * itemsize))
    region = KernelRegion(
        f"kernel{index}",
        dtype,
        tuple(shape),
        parameter.numel() * itemsize,
        "direct",
        0,
        untouched=tuple(untouched),
    )
    return region, records


@st.composite
def shards(draw: st.DrawFn, shape: Sequence[int], world_size: int) -> list[list[Box]]:
    """Boxes of one tensor for every rank, which together hold all of it."""
    whole = Box.whole(shape)
    kind = draw(st.sampled_from(["replicated", "sharded", "hybrid", "grid", "ragged"]))
    everyone = list(range(world_size))
    if kind == "replicated" or not shape:
        owners = draw(st.sets(st.sampled_from(everyone), min_size=1))
        return [[whole] if r in owners else [] for r in everyone]
    dim = draw(st.integers(0, len(shape) - 1))

    def cuts(box: Box, dim: int, parts: int) -> list[Box]:
        marks = sorted(draw(st.integers(box.lo[dim], box.hi[dim])) for _ in range(parts - 1))
        ends = [box.lo[dim], *marks, box.hi[dim]]
        return [
            Box((*box.lo[:dim], a, *box.lo[dim + 1 :]), (*box.hi[:dim], b, *box.hi[dim + 1 :]))
            for a, b in itertools.pairwise(ends)
        ]

    if kind == "sharded":
        return [[box] for box in cuts(whole, dim, world_size)]
    if kind == "hybrid":
        pieces = cuts(whole, dim, max(1, world_size // 2))
        return [[pieces[r % len(pieces)]] for r in everyone]
    if kind == "grid":
        other = draw(st.integers(0, len(shape) - 1))
        pieces = [b for a in cuts(whole, dim, 2) for b in cuts(a, other, 2)]
        return [pieces[r::world_size] for r in everyone]
    # Boxes of any place and overlap; some rank holds all, in two parts.
    held: list[list[Box]] = [[] for _ in everyone]
    for r in everyone:
        lo = [draw(st.integers(0, n)) for n in shape]
        held[r].append(
            Box(tuple(lo), tuple(draw(st.integers(a, n)) for a, n in zip(lo, shape, strict=True)))
        )
    held[draw(st.sampled_from(everyone))] += cuts(whole, dim, 2)
    return held


@st.composite
def worlds(draw: st.DrawFn) -> World:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    checkpoint = {}
    for k in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        dtype = getattr(torch, draw(st.sampled_from(DTYPES[:4])))
        checkpoint[f"t{k}"] = (torch.randn(shape, generator=generator) * 10).to(dtype)
    layouts: list[WorkerLayout] = []
    for w in range(draw(st.integers(1, 3))):
        made = [draw(regions(checkpoint, k)) for k in range(draw(st.integers(1, 2)))]
        if layouts and draw(st.booleans()):  # a replica of the worker before
            layout = dataclasses.replace(layouts[-1], place=WorkerPlace(dp=w))
        else:
            records = tuple(record for _, some in made for record in some)
            layout = WorkerLayout(
                WorkerPlace(tp=w), tuple(r for r, _ in made), records, tuple(checkpoint)
            )
        layouts.append(layout)
    world_size = draw(st.integers(1, 4))
    bound = draw(st.sampled_from([None, 128, 192, 256, 640, 1024]))
    if world_size == 1 and draw(st.booleans()):
        return World(checkpoint, layouts, None, max_slot_nbytes=bound)
    held: list[dict[str, list[Box]]] = [{} for _ in range(world_size)]
    for name, tensor in checkpoint.items():
        for rank, boxes in enumerate(draw(shards(tuple(tensor.shape), world_size))):
            held[rank][name] = boxes
    return World(
        checkpoint,
        layouts,
        held,
        draw(st.sampled_from([1, 16, 1 << 20])),
        bound,
        draw(st.sampled_from([0, 64, 256, 1 << 20])),
    )


@moderate
@given(worlds())
def test_a_plan_moves_the_bytes_that_a_load_makes(world: World) -> None:
    plans = world.plans()
    push(world, plans)
    # Each rank plans alone and must come to the same answer.
    alone = [
        build_plan(
            world.manifest,
            world.layouts,
            world.holdings,
            rank=plan.rank,
            split_nbytes=world.split_nbytes,
            max_slot_nbytes=world.max_slot_nbytes,
            coalesce_nbytes=world.coalesce_nbytes,
            allow_skipped=["*"],
        )
        for plan in plans
    ]
    assert alone == plans


@st.composite
def lending(draw: st.DrawFn) -> World:
    """A world in which ranks lend some of their boxes, side by side or with gaps."""
    world = draw(worlds())
    holdings = world.holdings
    if holdings is None:
        holdings = [{n: [Box.whole(tuple(t.shape))] for n, t in world.checkpoint.items()}]
    lendable = []
    for rank, held in enumerate(holdings):
        ends = [0, 0]
        places = {}
        for tensor, box in [(t, k) for t, boxes in held.items() for k in range(len(boxes))]:
            values = world.shard(rank, tensor, box)
            if not values.numel() or draw(st.integers(0, 3)) == 0:
                continue
            block = draw(st.sampled_from([0, 0, 0, 1]))
            at = ends[block] + draw(st.sampled_from([0, 0, 0, 2, 64]))
            places[tensor, box] = Place(block, at, str(values.dtype).removeprefix("torch."))
            ends[block] = at + values.nbytes
        lendable.append(Lendable(tuple(ends), places))
    least = draw(st.sampled_from([1, 8, 32, 128]))
    return dataclasses.replace(world, lendable=lendable, lend_nbytes=least)


@settings(moderate, max_examples=150)
@given(lending())
def test_a_plan_that_lends_moves_the_same_bytes(world: World) -> None:
    plans = world.plans()
    push(world, plans)
    assert world.lendable is not None
    for plan in plans:
        assert set(plan.lent) <= set(world.lendable[plan.rank].places)


def test_neighbours_are_lent_as_one_write_and_what_is_small_is_copied() -> None:
    experts = torch.arange(4 * 64, dtype=torch.float32).view(4, 64)
    small = torch.arange(8, dtype=torch.float32)
    layout = WorkerLayout(
        WorkerPlace(),
        (
            KernelRegion("stack", "float32", (4, 64), 1024, "direct", 0),
            KernelRegion("small", "float32", (8,), 32, "direct", 0),
        ),
        (
            *(CopyRecord(f"e{k}", (64,), 0, (1,), 0, 64 * k, (1,)) for k in range(4)),
            CopyRecord("small", (8,), 0, (1,), 1, 0, (1,)),
        ),
        ("e0", "e1", "e2", "e3", "small"),
    )
    world = World(
        {**{f"e{k}": experts[k].clone() for k in range(4)}, "small": small}, [layout], None
    )
    places = {(f"e{k}", 0): Place(0, 512 + 256 * k, "float32") for k in range(4)}
    world.lendable = [Lendable((2048,), places | {("small", 0): Place(0, 0, "float32")})]
    world.lend_nbytes = 1024
    (plan,) = world.plans()
    push(world, [plan])
    assert plan.lent == tuple(places)
    assert plan.slot_nbytes == 64
    assert [(w.slot_offset, w.nbytes) for w in plan.writes[0]] == [(64 + 512, 1024), (0, 32)]
    # one more byte of them is asked for: all are copied
    world.lend_nbytes = 1025
    (plan,) = world.plans()
    assert plan.lent == ()
    assert [(w.slot_offset, w.nbytes) for w in plan.writes[0]] == [(0, 1024), (1024, 32)]
    # another dtype in the engine: there is something to compute
    world.lend_nbytes = 1
    world.lendable = [Lendable((2048,), {k: p._replace(dtype="int32") for k, p in places.items()})]
    assert world.plans()[0].lent == ()


# ------------------------------------------------------------------ broken ones


def sound(layout: WorkerLayout, written: Sequence[tuple[int, int, int]]) -> bool:
    """Whether writes (region, offset, nbytes) are exactly once, by counting bytes."""
    count = [[0] * region.nbytes for region in layout.regions]
    for k, region in enumerate(layout.regions):
        for start, stop in region.untouched:
            for byte in range(start, stop):
                count[k][byte] += 1
    for k, offset, nbytes in written:
        if not 0 <= k < len(count) or nbytes < 1 or not 0 <= offset <= len(count[k]) - nbytes:
            return False
        for byte in range(offset, offset + nbytes):
            count[k][byte] += 1
    return all(n == 1 for counts in count for n in counts)


@moderate
@given(worlds(), st.data())
def test_the_worker_refuses_declared_writes_exactly_when_they_are_unsound(
    world: World, data: st.DataObject
) -> None:
    declared = {plan.rank: plan.declared(0) for plan in world.plans()}
    rank = data.draw(st.sampled_from([r for r in declared if declared[r]] or [0]))
    writes = declared[rank]
    k = data.draw(st.integers(0, max(0, len(writes) - 1)))
    region, offset, nbytes = writes[k] if writes else (0, 0, 1)
    small = st.sampled_from([-2, -1, 0, 0, 0, 1, 2])
    extra = [(region + data.draw(small), offset + data.draw(small), nbytes + data.draw(small))]
    writes[k : k + 1] = data.draw(st.sampled_from([extra, [], [*writes[k : k + 1], *extra]]))
    if sound(world.layouts[0], [w for some in declared.values() for w in some]):
        check_writes(world.layouts[0], declared)
    else:
        with pytest.raises(PlanError):
            check_writes(world.layouts[0], declared)


@moderate
@given(worlds(), st.data())
def test_a_plan_is_refused_exactly_when_the_layout_is_unsound(
    world: World, data: st.DataObject
) -> None:
    layout = world.layouts[0]
    records = list(layout.records)
    k = data.draw(st.integers(0, len(records) - 1))
    small = st.sampled_from([-1, 0, 0, 0, 0, 1])
    record = records[k]
    changed = dataclasses.replace(
        record,
        dst_offset=record.dst_offset + data.draw(small),
        region=record.region + data.draw(small),
        shape=tuple(n + data.draw(small) for n in record.shape),
        dst_strides=tuple(s + data.draw(small) for s in record.dst_strides),
    )
    records[k : k + 1] = data.draw(st.sampled_from([[changed], [], [record, changed]]))
    world.layouts = [dataclasses.replace(layout, records=tuple(records))]
    written = []
    inside = True
    for r in records:
        lowest = min((*r.shape, *r.dst_strides, r.dst_offset))
        if not 0 <= r.region < len(layout.regions) or lowest < 0:
            inside = False
            break
        itemsize = getattr(torch, layout.regions[r.region].dtype).itemsize
        numel = world.checkpoint[r.tensor].numel()
        for index in itertools.product(*(range(n) for n in r.shape)):
            src = r.src_offset + sum(i * s for i, s in zip(index, r.src_strides, strict=True))
            dst = r.dst_offset + sum(i * s for i, s in zip(index, r.dst_strides, strict=True))
            inside &= src < numel
            written.append((r.region, dst * itemsize, itemsize))
    if inside and sound(layout, written):
        push(world, world.plans())
    else:
        with pytest.raises((PlanError, ManifestError)):
            world.plans()
