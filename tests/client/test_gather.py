"""Small tensors that are cut over the ranks: one rank gets each whole and writes it once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import rows, same_error, same_report, sharded
from reference import Agent, Region
from test_push import arrived
from thread_ranks import ThreadRanks

from weightsync.errors import InputError, RankFailedError
from weightsync.quantize import quantize
from weightsync.transport.nixl import NixlTransport
from weightsync_client import QuantizationSpec, StateDictSource

RANKS = 4
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8,
    torch.int64, torch.bool,
]  # fmt: skip


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Norms of every dtype, cut unevenly, and one tensor that is too large to be gathered."""
    torch.manual_seed(0)
    norms = {f"n{i}": (torch.randn(9 + i) * 3).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**norms, "m": torch.randn(5, 3), "large": torch.randn(64, 100)}


def written(agent: Agent) -> dict[int, int]:
    """How many writes each rank makes to a worker."""
    return {rank: len(writes) for rank, writes in agent.workers[0].writes.items()}


def test_small_tensors_are_written_once_and_anew_in_every_push(
    agent: Agent, make_job, weights: dict[str, torch.Tensor]
) -> None:
    job = make_job(agent, ranks=RANKS, coalesce_bytes=4096)
    for version in (1, 2):
        report = same_report(job.push(sharded(weights, RANKS)))
        assert report.version == version
        assert arrived(agent, weights)
        for name, tensor in weights.items():
            weights[name] = (torch.randn(tensor.shape) * 3).to(tensor.dtype)
    assert agent.calls.count("/init_transfer") == 1
    # four quarters of the large one, the others once
    assert sum(written(agent).values()) == RANKS + len(weights) - 1
    assert set(written(agent)) == set(range(RANKS))


def test_without_coalescing_every_rank_writes_what_it_has(agent: Agent, make_job) -> None:
    tensors = {f"n{i}": torch.randn(8) for i in range(3)}
    for coalesce_bytes, count in ((0, 3 * RANKS), (1 << 20, 3)):
        job = make_job(agent, ranks=RANKS, coalesce_bytes=coalesce_bytes)
        same_report(job.push(sharded(tensors, RANKS)))
        assert arrived(agent, tensors)
        assert sum(written(agent).values()) == count


def test_gathered_masters_are_rounded_once_to_the_checkpoints_dtype(
    make_agent: Callable[..., Agent], make_job
) -> None:
    """fp32 at the trainer, bf16 in the checkpoint, fp32 at the engine (WS-12)."""
    agent = make_agent(regions=lambda _: [Region("n", "float32", ["n"])])
    master = torch.randn(37)
    sources = [StateDictSource({"n": part}, dtype=torch.bfloat16) for part in rows(master, 3)]
    same_report(make_job(agent, ranks=3).push(sources))
    assert written(agent) == {0: 1}
    assert arrived(agent, {"n": master.bfloat16().float()})


def test_gathered_tensors_go_through_bounded_slots(
    make_agent: Callable[..., Agent], make_job
) -> None:
    agent = make_agent(n_workers=2)
    tensors = {f"n{i}": torch.randn(200 + i) for i in range(40)} | {"large": torch.randn(64, 300)}
    job = make_job(agent, ranks=2, coalesce_bytes=4096, max_slot_bytes=4096)
    for _ in range(2):
        report = same_report(job.push(sharded(tensors, 2)))
        assert report.rounds > 10
        assert all(arrived(agent, tensors, worker=w) for w in range(2))
        for tensor in tensors.values():
            tensor.add_(1)


@pytest.mark.parametrize("coalesce_bytes", [0, 1 << 20])
def test_fp8_blocks_that_shards_cut_go_the_same_way(
    coalesce_bytes: int, agent: Agent, make_job
) -> None:
    masters = {"a.weight": torch.randn(300, 200), "b.weight": torch.randn(40, 130)}
    job = make_job(
        agent,
        ranks=3,
        coalesce_bytes=coalesce_bytes,
        max_slot_bytes=8192,
        quantization=QuantizationSpec(),
    )
    for _ in range(2):
        report = same_report(job.push(sharded(masters, 3)))
        assert report.rounds > 2
        for name, master in masters.items():
            wanted = quantize(master)
            assert arrived(agent, {f"{name}_scale_inv": wanted.scale_inv})
            assert torch.equal(
                agent.workers[0].buffers[name], wanted.weight.view(-1).view(torch.uint8)
            )
            master.mul_(1.5)


def test_the_threshold_of_rank_0_counts_for_all(agent: Agent, make_job, weights) -> None:
    job = make_job(agent, ranks=2)
    for publisher, coalesce_bytes in zip(job.publishers, (4096, 0), strict=True):
        object.__setattr__(publisher._settings, "coalesce_nbytes", coalesce_bytes)
    same_report(job.push(sharded(weights, 2)))
    assert arrived(agent, weights)


def test_a_rank_that_cannot_pack_fails_all_before_any_gives_or_takes(
    agent: Agent, make_job, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[int] = []
    exchange = ThreadRanks.exchange

    def watched(ranks: ThreadRanks, *args: Any, **kwargs: Any) -> None:
        exchanged.append(ranks.rank)
        exchange(ranks, *args, **kwargs)

    monkeypatch.setattr(ThreadRanks, "exchange", watched)
    job = make_job(agent, ranks=3)
    shards = sharded(weights, 3)
    broken = StateDictSource(shards[1])
    monkeypatch.setattr(broken, "local", lambda name, index: torch.ones(1, 1, 1, 1))
    error = same_error(job.push([shards[0], broken, shards[2]]), InputError, 1)
    assert "declared was" in str(error)
    assert error.context["phase"] == "fill"
    assert exchanged == []
    assert "/pause" not in agent.calls
    same_report(job.push(shards))
    assert sorted(exchanged) == [0, 1, 2]
    assert arrived(agent, weights)


def test_a_rank_that_leaves_in_the_exchange_ends_the_push_of_all(
    agent: Agent, make_job, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(agent, ranks=3)
    exchange = ThreadRanks.exchange
    over = threading.Event()

    def leave(ranks: ThreadRanks, *args: Any, timeout_s: float) -> None:
        if ranks.rank == 1:
            raise KeyboardInterrupt
        try:
            exchange(ranks, *args, timeout_s=0.3)
        finally:
            over.set()

    monkeypatch.setattr(ThreadRanks, "exchange", leave)
    results = job.push(sharded(weights, 3))
    assert over.is_set()
    assert [type(r) for r in results] == [RankFailedError, KeyboardInterrupt, RankFailedError]
    assert "rank 1" in str(results[0])
    assert "/pause" not in agent.calls
    assert agent.generating


@pytest.mark.gpu
@pytest.mark.nixl
def test_small_tensors_on_gpus_are_gathered_and_land(
    make_agent: Callable[..., Agent], make_job, weights: dict[str, torch.Tensor]
) -> None:
    agent = make_agent(make_transport=lambda: NixlTransport("worker"))
    make = {rank: lambda rank=rank: NixlTransport(f"trainer{rank}") for rank in range(2)}
    job = make_job(agent, ranks=2, coalesce_bytes=4096, transports=make)
    shards = sharded(weights, 2)
    for shard in shards:
        for name, part in shard.items():
            shard[name] = replace(part, tensor=part.tensor.cuda())
    for _ in range(2):
        same_report(job.push(shards))
        assert arrived(agent, weights)
