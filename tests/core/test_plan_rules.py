from __future__ import annotations

import dataclasses
import time

import pytest

from weightsync.coverage import check_writes
from weightsync.errors import ManifestError, PlanError, WeightSyncError
from weightsync.geometry import Box
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace
from weightsync.manifest import Manifest, TensorSpec
from weightsync.plan import build_plan, build_plans


def spec(name: str, *shape: int, alias_of: str = "") -> TensorSpec:
    return TensorSpec(name, "bfloat16", shape, alias_of)


def region(
    name: str, *shape: int, untouched: tuple[tuple[int, int], ...] = (), dtype: str = "bfloat16"
) -> KernelRegion:
    numel = 1
    for n in shape:
        numel *= n
    nbytes = numel * {"bfloat16": 2, "float32": 4}[dtype]
    return KernelRegion(name, dtype, shape, nbytes, "direct", 4096, untouched=untouched)


def rows(tensor: str, region: int, n: int, dst: int = 0, src: int = 0) -> CopyRecord:
    """``n`` elements in a row."""
    return CopyRecord(tensor, (n,), src, (1,), region, dst, (1,))


def qkv() -> tuple[Manifest, WorkerLayout]:
    """q, k and v of 4x8 fused into one kernel tensor, and a norm."""
    manifest = Manifest.of([spec("q", 4, 8), spec("k", 4, 8), spec("v", 4, 8), spec("norm", 8)])
    layout = WorkerLayout(
        WorkerPlace(tp=1),
        (region("qkv_proj", 12, 8), region("norm.weight", 8)),
        (rows("q", 0, 32), rows("k", 0, 32, 32), rows("v", 0, 32, 64), rows("norm", 1, 8)),
    )
    return manifest, layout


def without(layout: WorkerLayout, tensor: str) -> WorkerLayout:
    kept = tuple(r for r in layout.records if r.tensor != tensor)
    return dataclasses.replace(layout, records=kept)


def plus(layout: WorkerLayout, *records: CopyRecord) -> WorkerLayout:
    return dataclasses.replace(layout, records=layout.records + records)


def test_adjacent_runs_become_one_write_and_slots_are_aligned() -> None:
    manifest, layout = qkv()
    plan = build_plan(manifest, [layout])
    assert [(w.region, w.offset, w.nbytes) for w in plan.writes[0]] == [(0, 0, 192), (1, 0, 16)]
    assert [w.slot_offset for w in plan.writes[0]] == [0, 192]
    assert plan.slot_nbytes == 256
    assert [f.tensor for f in plan.fills] == ["q", "k", "v", "norm"]
    assert plan.nbytes == manifest.nbytes
    assert plan.declared(0) == [(0, 0, 192), (1, 0, 16)]


def test_replicas_read_the_same_slots() -> None:
    manifest, layout = qkv()
    replicas = [dataclasses.replace(layout, place=WorkerPlace(dp=k)) for k in range(3)]
    plan = build_plan(manifest, replicas)
    assert plan.writes[0] == plan.writes[1] == plan.writes[2]
    assert plan.slot_nbytes == build_plan(manifest, [layout]).slot_nbytes
    assert plan.nbytes == 3 * manifest.nbytes


def test_a_norm_that_all_tp_workers_want_lies_in_one_slot() -> None:
    manifest = Manifest.of([spec("w", 4, 8), spec("norm", 8)])
    layouts = [
        WorkerLayout(
            WorkerPlace(tp=tp),
            (region("norm.weight", 8), region("w", 2, 8)),
            (rows("norm", 0, 8), rows("w", 1, 16, 0, 16 * tp)),
        )
        for tp in range(2)
    ]
    plan = build_plan(manifest, layouts)
    norms = [next(w for w in writes if w.region == 0) for writes in plan.writes]
    halves = [next(w for w in writes if w.region == 1) for writes in plan.writes]
    assert norms[0].slot_offset == norms[1].slot_offset
    assert halves[0].slot_offset != halves[1].slot_offset
    assert len(plan.fills) == 3


def test_regularly_spaced_intervals_are_one_fill() -> None:
    """A column shard: 64 rows of 16 columns each, 64 writes, one copy."""
    manifest = Manifest.of([spec("w", 64, 64)])
    layout = WorkerLayout(WorkerPlace(), (region("w", 64, 64),), (rows("w", 0, 64 * 64),))
    holdings = [{"w": [Box((0, 16 * r), (64, 16 * r + 16))]} for r in range(4)]
    for plan in build_plans(manifest, [layout], holdings):
        (fill,) = plan.fills
        assert fill.shape == (64, 16)
        assert fill.slot_strides == (32, 1)  # 32 bytes a row, each aligned to 64
        assert len(plan.writes[0]) == 64


def test_replicated_bytes_are_balanced_and_written_once() -> None:
    shapes = [(1000 + 37 * k, 16) for k in range(40)]
    manifest = Manifest.of(spec(f"t{k}", *shape) for k, shape in enumerate(shapes))
    layout = WorkerLayout(
        WorkerPlace(),
        tuple(region(f"p{k}", *shape) for k, shape in enumerate(shapes)),
        tuple(rows(f"t{k}", k, n * m) for k, (n, m) in enumerate(shapes)),
    )
    holdings = [{f"t{k}": [Box.whole(s)] for k, s in enumerate(shapes)} for _ in range(8)]
    loads = [plan.nbytes for plan in build_plans(manifest, [layout], holdings)]
    assert sum(loads) == manifest.nbytes
    assert max(loads) < 1.05 * sum(loads) / 8


def test_one_large_replicated_tensor_is_cut_between_its_holders() -> None:
    manifest = Manifest.of([spec("embed", 1001, 64)])
    layout = WorkerLayout(WorkerPlace(), (region("embed", 1001, 64),), (rows("embed", 0, 64064),))
    holdings = [{"embed": [Box.whole((1001, 64))]} for _ in range(4)]
    plans = build_plans(manifest, [layout], holdings, split_nbytes=1024)
    loads = [plan.nbytes for plan in plans]
    assert sum(loads) == manifest.nbytes
    assert max(loads) - min(loads) <= 128
    assert all(len(plan.writes[0]) == 1 for plan in plans)


def test_a_rank_that_holds_less_elsewhere_takes_the_shared_bytes() -> None:
    manifest = Manifest.of([spec("a", 64), spec("b", 64)])
    layout = WorkerLayout(
        WorkerPlace(), (region("a", 64), region("b", 64)), (rows("a", 0, 64), rows("b", 1, 64))
    )
    whole = Box.whole((64,))
    plans = build_plans(manifest, [layout], [{"a": [whole], "b": [whole]}, {"a": [whole]}])
    assert [plan.declared(0) for plan in plans] == [[(1, 0, 128)], [(0, 0, 128)]]


def norms(n: int, ranks: int) -> tuple[Manifest, WorkerLayout, list[dict[str, list[Box]]]]:
    """``n`` vectors of 64 elements, and a large tensor, cut evenly over the ranks."""
    manifest = Manifest.of([*(spec(f"n{k}", 64) for k in range(n)), spec("w", 64, 64)])
    layout = WorkerLayout(
        WorkerPlace(),
        (*(region(f"n{k}", 64) for k in range(n)), region("w", 64, 64)),
        (*(rows(f"n{k}", k, 64) for k in range(n)), rows("w", n, 4096)),
    )
    each = 64 // ranks
    holdings = [
        {t.name: [Box((each * r, 0)[: len(t.shape)], (each * r + each, 64)[: len(t.shape)])]
         for t in manifest}
        for r in range(ranks)
    ]  # fmt: skip
    return manifest, layout, holdings


def test_small_tensors_are_gathered_and_written_once_by_ranks_in_turn() -> None:
    manifest, layout, holdings = norms(8, 4)
    cut = build_plans(manifest, [layout], holdings)
    plans = build_plans(manifest, [layout], holdings, coalesce_nbytes=128)
    assert [len(plan.writes[0]) for plan in cut] == [9] * 4
    assert [len(plan.writes[0]) for plan in plans] == [3] * 4
    assert len({plan.nbytes for plan in plans}) == 1
    for rank, plan in enumerate(plans):
        taken = {s.tensor for s in plan.shares if s.taker == rank}
        assert len(taken) == 2
        # its own quarter, and three that come from the others
        assert sum(s.nbytes for s in plan.shares if s.taker == rank != s.giver) == 2 * 96
        assert {fill.tensor for fill in plan.fills} == {*taken, "w"}
    assert not any(share.tensor == "w" for plan in plans for share in plan.shares)


def test_thousands_of_small_tensors_over_hundreds_of_ranks_are_planned_in_seconds() -> None:
    """A rank's plan names what it gives and takes, not what all ranks do."""
    n, ranks = 4_000, 256
    manifest = Manifest.of(spec(f"n{k}", ranks, 4) for k in range(n))
    layout = WorkerLayout(
        WorkerPlace(),
        tuple(region(f"n{k}", ranks, 4) for k in range(n)),
        tuple(rows(f"n{k}", k, ranks * 4) for k in range(n)),
    )
    boxes = [(Box((r, 0), (r + 1, 4)),) for r in range(ranks)]
    holdings = [dict.fromkeys((f"n{k}" for k in range(n)), mine) for mine in boxes]
    started = time.process_time()
    (plan,) = build_plans(manifest, [layout], holdings, ranks=[3], coalesce_nbytes=1 << 20)
    assert time.process_time() - started < 20
    taken = len({s.tensor for s in plan.shares if s.taker == 3})
    assert n // ranks <= taken <= n // ranks + 1
    assert len(plan.shares) == n + taken * (ranks - 1)
    assert sum(len(writes) for writes in plan.writes) == taken


def test_a_tensor_just_above_the_threshold_is_not_gathered() -> None:
    manifest, layout, holdings = norms(8, 4)
    plans = build_plans(manifest, [layout], holdings, coalesce_nbytes=127)
    assert not any(plan.shares for plan in plans)


def test_who_holds_all_of_a_small_tensor_writes_it_without_an_exchange() -> None:
    manifest, layout, holdings = norms(8, 4)
    first, second = Box((0,), (32,)), Box((32,), (64,))
    for k in range(8):
        holdings[3][f"n{k}"] = [second, first]
    plans = build_plans(manifest, [layout], holdings, coalesce_nbytes=1 << 20)
    small = [s.tensor for plan in plans for s in plan.shares if s.tensor != "w"]
    assert small == []
    written = {name for plan in plans for name in {f.tensor for f in plan.fills} - {"w"}}
    assert written == {f.tensor for f in plans[3].fills} - {"w"}


def test_gathered_tensors_go_to_the_ranks_that_write_least() -> None:
    manifest, layout, holdings = norms(8, 4)
    manifest = Manifest.of([*manifest, spec("own", 512)])
    layout = dataclasses.replace(
        plus(layout, rows("own", 9, 512)), regions=(*layout.regions, region("own", 512))
    )
    holdings[2]["own"] = [Box.whole((512,))]
    plans = build_plans(manifest, [layout], holdings, coalesce_nbytes=128)
    takers = {s.taker for plan in plans for s in plan.shares}
    assert takers == {0, 1, 3}


def test_small_tensors_that_are_not_whole_are_refused_as_without_a_threshold() -> None:
    manifest, layout, holdings = norms(8, 4)
    holdings[1]["n3"] = []
    with pytest.raises(PlanError, match="'n3', of which the ranks hold 48 elements"):
        build_plans(manifest, [layout], holdings, coalesce_nbytes=128)


# ------------------------------------------------------------------ what the proof refuses


def refused(error: type[WeightSyncError], *args: object, **kwargs: object) -> WeightSyncError:
    with pytest.raises(error) as caught:
        build_plans(*args, **kwargs)  # type: ignore[arg-type]
    assert type(caught.value) is error
    assert caught.value.hint
    return caught.value


def test_a_hole_names_kernel_tensor_bytes_and_the_tensors_around_it() -> None:
    manifest, layout = qkv()
    rest = Manifest.of(t for t in manifest if t.name != "k")
    error = refused(ManifestError, rest, [without(layout, "k")])
    for part in (
        "'qkv_proj'",
        "engine0/dp0/pp0/tp1",
        "bytes [64, 128)",
        "elements [32, 64)",
        "q, v",
    ):
        assert part in error.message
    assert error.context["bytes"] == [64, 128]


def test_a_record_of_a_tensor_that_is_missing_names_it_and_its_neighbours() -> None:
    manifest, layout = qkv()
    names = Manifest.of(spec("v_proj" if t.name == "v" else t.name, *t.shape) for t in manifest)
    layout = plus(without(layout, "v"), rows("v_proj.weight", 0, 32, 64))
    error = refused(ManifestError, names, [layout])
    assert "'v_proj.weight'" in error.message
    assert "'qkv_proj'" in error.message
    assert "v_proj" in error.hint


def test_bytes_that_no_rank_holds_name_the_checkpoint_tensor() -> None:
    manifest, layout = qkv()
    whole = {t.name: [Box.whole(t.shape)] for t in manifest}
    error = refused(PlanError, manifest, [layout], [{**whole, "v": [Box((0, 0), (4, 6))]}])
    assert "'v'" in error.message
    assert "24 elements" in error.message
    assert error.context["tensor"] == "v"
    error = refused(PlanError, manifest, [layout], [{**whole, "norm": []}])
    assert "'norm'" in error.message


def test_a_byte_that_is_written_twice_names_both_tensors() -> None:
    manifest, layout = qkv()
    error = refused(PlanError, manifest, [plus(layout, rows("norm", 0, 8, 60))])
    assert "'qkv_proj'" in error.message
    assert set(error.context["tensors"]) >= {"norm", "k"}
    # once more, within one copy: a broadcast on the destination side
    twice = CopyRecord("norm", (2, 8), 0, (0, 1), 1, 0, (0, 1))
    refused(PlanError, manifest, [plus(without(layout, "norm"), twice)])
    overlap = CopyRecord("norm", (2, 4), 0, (4, 1), 1, 0, (3, 1))
    refused(PlanError, manifest, [plus(without(layout, "norm"), overlap)])


def test_an_untouched_interval_that_a_copy_covers_is_an_error() -> None:
    manifest, layout = qkv()
    padded = dataclasses.replace(layout.regions[1], untouched=((12, 16),))
    layout = dataclasses.replace(layout, regions=(layout.regions[0], padded))
    error = refused(PlanError, manifest, [layout])
    assert "untouched" in error.message
    assert "norm" in error.context["tensors"]


@pytest.mark.parametrize(
    "record",
    [
        rows("norm", 1, 9),  # beyond the tensor
        rows("q", 1, 8, 1),  # beyond the region
        rows("norm", 2, 8),  # no such region
        rows("norm", -1, 8),
        CopyRecord("norm", (8,), 0, (1, 1), 1, 0, (1,)),
        CopyRecord("norm", (8,), 0, (1,), 1, -1, (1,)),
        CopyRecord("norm", (8,), 7, (-1,), 1, 0, (1,)),
        CopyRecord("norm", (1 << 40,), 0, (0,), 1, 0, (0,)),
    ],
)
def test_a_record_out_of_range_is_refused(record: CopyRecord) -> None:
    manifest, layout = qkv()
    refused(PlanError, manifest, [plus(without(layout, "norm"), record)], allow_skipped=["norm"])


@pytest.mark.parametrize("interval", [(0, 17), (-1, 2), (4, 4), (8, 4)])
def test_a_broken_untouched_interval_is_refused(interval: tuple[int, int]) -> None:
    manifest, layout = qkv()
    broken = dataclasses.replace(layout.regions[1], untouched=(interval,))
    layout = dataclasses.replace(layout, regions=(layout.regions[0], broken))
    refused(PlanError, manifest, [layout])


def test_a_replica_is_proven_with_its_own_size_and_untouched_bytes() -> None:
    manifest, layout = qkv()
    for norm in (region("norm.weight", 9), region("norm.weight", 8, untouched=((0, 2),))):
        other = dataclasses.replace(
            layout, place=WorkerPlace(dp=1), regions=(layout.regions[0], norm)
        )
        with pytest.raises((ManifestError, PlanError), match="dp1"):
            build_plans(manifest, [layout, other])


def test_a_tensor_that_every_engine_skips_is_unknown() -> None:
    manifest, layout = qkv()
    more = Manifest.of([*manifest, spec("norm.weigth", 8), spec("rotary.inv_freq", 8)])
    skipping = dataclasses.replace(layout, skipped=("norm.weigth", "rotary.inv_freq"))
    error = refused(ManifestError, more, [skipping])
    assert "unknown to the engine" in error.message
    assert error.context["names"] == ["norm.weigth", "rotary.inv_freq"]
    error = refused(ManifestError, more, [skipping], allow_skipped=["*.inv_freq"])
    assert error.context["names"] == ["norm.weigth"]
    build_plan(more, [skipping], allow_skipped=["*.inv_freq", "norm.weig??"])
    # not reported by the loader at all: the engine traced something else
    refused(PlanError, more, [skipping, layout], allow_skipped=["*"])


def test_the_nearest_known_name_is_told() -> None:
    names = [f"model.layers.{k}.mlp.gate_proj.weight" for k in range(3)]
    manifest = Manifest.of(
        [*(spec(n, 8) for n in names), spec("model.layers.1.mlp.gate.weight", 8)]
    )
    layout = WorkerLayout(
        WorkerPlace(),
        tuple(region(n, 8) for n in names),
        tuple(rows(n, k, 8) for k, n in enumerate(names)),
        skipped=("model.layers.1.mlp.gate.weight",),
    )
    error = refused(ManifestError, manifest, [layout])
    assert "did you mean model.layers.1.mlp.gate_proj.weight" in error.message


def test_a_tied_tensor_may_be_skipped_if_its_twin_is_used() -> None:
    manifest = Manifest.of([spec("embed", 8, 4), spec("lm_head", 8, 4, alias_of="embed")])
    embed = WorkerLayout(
        WorkerPlace(), (region("embed", 8, 4),), (rows("embed", 0, 32),), skipped=("lm_head",)
    )
    head = WorkerLayout(
        WorkerPlace(), (region("head", 8, 4),), (rows("lm_head", 0, 32),), skipped=("embed",)
    )
    assert build_plan(manifest, [embed]).nbytes == 64
    assert build_plan(manifest, [head]).nbytes == 64
    none = WorkerLayout(WorkerPlace(), (), (), skipped=("embed", "lm_head"))
    assert refused(ManifestError, manifest, [none]).context["names"] == ["embed", "lm_head"]


def test_a_tensor_that_one_pipeline_stage_skips_is_known() -> None:
    manifest = Manifest.of([spec("a", 8), spec("b", 8)])
    layouts = [
        WorkerLayout(WorkerPlace(pp=0), (region("a", 8),), (rows("a", 0, 8),), skipped=("b",)),
        WorkerLayout(WorkerPlace(pp=1), (region("b", 8),), (rows("b", 0, 8),), skipped=("a",)),
    ]
    plan = build_plan(manifest, layouts)
    assert [len(writes) for writes in plan.writes] == [1, 1]


def test_scalars_empty_tensors_and_untouched_regions_need_nothing_special() -> None:
    manifest = Manifest.of([spec("scale"), spec("empty", 0, 4), spec("other", 3, 0)])
    layout = WorkerLayout(
        WorkerPlace(),
        (
            region("scale", dtype="float32"),
            region("empty", 0, 4),
            region("pad", 8, untouched=((0, 4), (4, 16))),
        ),
        (
            CopyRecord("scale", (), 0, (), 0, 0, ()),
            CopyRecord("empty", (0, 4), 0, (4, 1), 1, 0, (4, 1)),
        ),
    )
    for holdings in (None, [{"scale": [Box((), ())], "empty": [Box((0, 0), (0, 4))]}]):
        plan = build_plan(manifest, [layout], holdings)
        assert plan.declared(0) == [(0, 0, 4)]
        check_writes(layout, {0: plan.declared(0)})
    bare = WorkerLayout(
        WorkerPlace(),
        layout.regions[1:],
        (dataclasses.replace(layout.records[1], region=0),),
        skipped=("scale",),
    )
    nothing = build_plan(manifest, [bare], allow_skipped=["scale"])
    assert (nothing.slot_nbytes, nothing.fills, nothing.writes) == (0, (), ((),))


def test_holdings_that_cannot_be_are_refused() -> None:
    manifest, layout = qkv()
    whole = {t.name: [Box.whole(t.shape)] for t in manifest}
    refused(ManifestError, manifest, [layout], [{**whole, "x": [Box((0,), (1,))]}])
    for box in (Box((0, 0), (5, 8)), Box((0,), (4,)), Box((3, 0), (2, 8)), Box((-1, 0), (2, 8))):
        refused(PlanError, manifest, [layout], [whole, {"q": [box]}])
    refused(PlanError, manifest, [layout], [whole], ranks=[1])
    refused(PlanError, manifest, [], [whole])


# ------------------------------------------------------------------ the worker's own proof


def test_the_worker_accepts_what_was_planned_and_nothing_else() -> None:
    manifest, layout = qkv()
    whole = {t.name: [Box.whole(t.shape)] for t in manifest}
    plans = build_plans(manifest, [layout], [whole, whole])
    declared = {plan.rank: plan.declared(0) for plan in plans}
    check_writes(layout, declared)
    flat = [(rank, k) for rank, writes in declared.items() for k in range(len(writes))]
    for rank, k in flat:
        at, offset, nbytes = declared[rank][k]
        for broken in (
            [],  # a hole
            [(at, offset, nbytes - 2)],  # a hole at the end
            [(at, offset, nbytes), (at, offset, 2)],  # an overlap
            [(1 - at, 0, min(nbytes, 16))],  # the wrong region
            [(at, offset + 2, nbytes)],  # moved: overlap, or out of range
            [(at, offset, nbytes), (at, layout.regions[at].nbytes, 2)],  # out of range
            [(at, offset, nbytes), (2, 0, 2)],
            [(at, offset, nbytes), (-1, 0, 2)],
            [(at, offset, nbytes), (at, -2, 2)],
            [(at, offset, nbytes), (at, 0, 0)],
            [(at, offset, nbytes), (at, 0, -2)],
            [(at, offset, nbytes), (at, 1 << 70, 1 << 70)],
        ):
            changed = {**declared, rank: [*declared[rank][:k], *broken, *declared[rank][k + 1 :]]}
            with pytest.raises(PlanError) as caught:
                check_writes(layout, changed)
            assert str(layout.place) in caught.value.message
            assert caught.value.hint
    other = {**declared, 7: declared[0]}
    with pytest.raises(PlanError, match=r"ranks \[0, 7\]"):
        check_writes(layout, other)
    with pytest.raises(PlanError, match="not written"):
        check_writes(layout, {})


def test_the_worker_refuses_a_write_into_untouched_bytes() -> None:
    padded = WorkerLayout(WorkerPlace(), (region("w", 8, untouched=((8, 16),)),), ())
    check_writes(padded, {0: [(0, 0, 8)]})
    with pytest.raises(PlanError, match="untouched"):
        check_writes(padded, {0: [(0, 0, 10)]})


# ------------------------------------------------------------------ speed


def model(layers: int, per_layer: int, tp: int = 1) -> tuple[Manifest, list[WorkerLayout]]:
    """``layers * per_layer`` matrices of 64 x 64, column-parallel for odd ones."""
    names = [f"layers.{k}.w{j}.weight" for k in range(layers) for j in range(per_layer)]
    part = 64 // tp
    layouts = []
    for t in range(tp):
        records = []
        for k in range(len(names)):
            at = (k, 0, (part, 1)) if k % 2 else (k, 0, (64, 1))
            shape, src, stride = (
                ((64, part), part * t, (64, 1)) if k % 2 else ((part, 64), part * 64 * t, (64, 1))
            )
            records.append(CopyRecord(names[k], shape, src, stride, *at))
        regions = tuple(
            region(f"p.{n}", *((64, part) if k % 2 else (part, 64))) for k, n in enumerate(names)
        )
        layouts.append(WorkerLayout(WorkerPlace(tp=t), regions, tuple(records)))
    return Manifest.of(spec(n, 64, 64) for n in names), layouts


def test_a_model_of_400_tensors_is_planned_in_no_time() -> None:
    manifest, layouts = model(40, 10)
    build_plan(manifest, layouts)
    start = time.perf_counter()
    build_plan(manifest, layouts)
    assert time.perf_counter() - start < 0.25  # 10 ms on a machine with nothing else to do


def test_planning_20_000_records_for_sharded_ranks_takes_seconds() -> None:
    manifest, layouts = model(200, 25, tp=4)
    holdings = [{t.name: [Box((16 * r, 0), (16 * r + 16, 64))] for t in manifest} for r in range(4)]
    start = time.perf_counter()
    plan = build_plan(manifest, layouts, holdings, rank=2)
    elapsed = time.perf_counter() - start
    assert plan.nbytes == manifest.nbytes // 4
    assert elapsed < 8  # 1 s on such a machine
