"""What the ranks of a pool do: build the same model from a seed, shard it, push it over NIXL."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from weightsync_client import Deadlines, LocalShard, Publisher
from weightsync_client.gloo import GlooRanks
from weightsync_client.source import Weights

DEADLINES = Deadlines(
    connect_s=5, status_s=10, rendezvous_s=30, pause_s=10, begin_s=10, write_s=10, commit_s=20,
    resume_s=10, abort_s=10, ranks_s=15, grace_s=1,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    """Rows 10, 12, 8, 3 and 1: uneven and empty shards with 2 and 4 ranks."""

    def __init__(self, seed: int, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.few = nn.Parameter(torch.randn(3, 5))
        self.one = nn.Parameter(torch.randn(1))
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def fused(seed: int) -> nn.Module:
    """A transformers model whose experts are one parameter a layer."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=12, num_experts=6,
        num_experts_per_tok=2, decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def mesh_of(ranks: int, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.arange(ranks).reshape(shape), mesh_dim_names=names)


def _fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in getattr(model, "layers", ()):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return parallelize_module(model, mesh, {"head": ColwiseParallel()})


def _experts(model: nn.Module, mesh: DeviceMesh, *placements: Any) -> nn.Module:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                part = distribute_tensor(parameter.detach(), mesh, placements)
                setattr(module, name, nn.Parameter(part))
    return model


def fsdp2(seed: int, ranks: int) -> Weights:
    return _fsdp(Model(seed), mesh_of(ranks, (ranks,), ("dp",)))


def hsdp(seed: int, ranks: int) -> Weights:
    return _fsdp(Model(seed), mesh_of(ranks, (2, ranks // 2), ("replicate", "shard")))


def tied(seed: int, ranks: int) -> Weights:
    return _fsdp(Model(seed, tied=True), mesh_of(ranks, (ranks,), ("dp",)))


def tp(seed: int, ranks: int) -> Weights:
    return _tp(Model(seed), mesh_of(ranks, (ranks,), ("tp",)))


def fsdp_tp(seed: int, ranks: int) -> Weights:
    mesh = mesh_of(ranks, (ranks // 2, 2), ("dp", "tp"))
    return _fsdp(_tp(Model(seed), mesh["tp"]), mesh["dp"])


def stages(seed: int, ranks: int) -> Weights:
    tensors = Model(seed).state_dict()
    return {n: t for i, (n, t) in enumerate(tensors.items()) if i % ranks == dist.get_rank()}


def replicas(seed: int, ranks: int) -> Weights:
    return nn.parallel.DistributedDataParallel(Model(seed))


def pairs(seed: int, ranks: int) -> Weights:
    mesh = mesh_of(ranks, (ranks,), ("dp",))
    whole = Model(seed).state_dict()
    return ((n, distribute_tensor(t, mesh, [Shard(t.ndim - 1)])) for n, t in whole.items())


def moe_fsdp(seed: int, ranks: int) -> Weights:
    return fully_shard(fused(seed), mesh=mesh_of(ranks, (ranks,), ("dp",)))


def moe_ep(seed: int, ranks: int) -> Weights:
    return _experts(fused(seed), mesh_of(ranks, (ranks,), ("ep",)), Shard(0))


def moe_ep_fsdp(seed: int, ranks: int) -> Weights:
    mesh = mesh_of(ranks, (2, ranks // 2), ("ep", "fsdp"))
    return _experts(fused(seed), mesh, Shard(0), Shard(1))


def moe_ep_hsdp(seed: int, ranks: int) -> Weights:
    mesh = mesh_of(ranks, (2, ranks // 2), ("replicate", "ep"))
    return _experts(fused(seed), mesh, Replicate(), Shard(0))


def push(url: str, build: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Push the models of some seeds, one after the other."""
    with Publisher([url], progress="off", deadlines=DEADLINES) as publisher:
        return [
            publisher.push(globals()[build](seed, dist.get_world_size())).to_dict()
            for seed in seeds
        ]


def push_from(url: str, members: list[int]) -> list[int] | None:
    """Some ranks push, twice with a new Publisher each; the others do not know of it."""
    group = dist.new_group(members)
    rank = dist.get_rank()
    if rank not in members:
        return None
    versions = []
    for _ in range(2):
        with Publisher([url], progress="off", deadlines=DEADLINES, group=group) as publisher:
            versions.append(publisher.push({f"w{rank}": torch.full((4,), float(rank))}).version)
    return versions


def push_alone(url: str) -> int | None:
    """Rank 0 has everything and pushes by itself."""
    if dist.get_rank():
        return None
    with Publisher([url], progress="off", deadlines=DEADLINES, group=None) as publisher:
        return publisher.push({"w": torch.ones(4)}).version


def push_with(url: str, fault: str, culprit: int) -> list[Any]:
    """One good push, one in which something is wrong on one rank, and a good one again."""
    told: list[Any] = []
    rank = dist.get_rank()
    with Publisher([url], progress="off", deadlines=DEADLINES) as publisher:
        for turn in range(3):
            weights = {f"w{r}": torch.full((4, 4), float(turn + r)) for r in (rank, 9)}
            weights["w9"] = torch.full((4, 4), float(turn))
            if turn == 1 and rank == culprit:
                if fault == "nan":
                    weights[f"w{rank}"][1, 1] = float("nan")
                elif fault == "prepare":
                    weights["new"] = torch.ones(3)
                    publisher._settings.make_transport.fails = True
                elif fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
            started = time.monotonic()
            try:
                told.append(publisher.push(weights).version)
            except Exception as error:
                told.append((type(error).__name__, str(error), time.monotonic() - started))
    return told


def _break_exchange(fault: str) -> None:
    exchange = GlooRanks.exchange

    def broken(*args: Any, **kwargs: Any) -> None:
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "late":
            time.sleep(2 * DEADLINES.write_s)
        elif fault == "leave":
            raise OSError("no more sockets")
        exchange(*args, **kwargs)

    GlooRanks.exchange = broken  # type: ignore[method-assign]


def push_cut(url: str, fault: str, culprit: int) -> list[Any]:
    """Small vectors cut over the ranks: a good push, and two from when something goes wrong."""
    told: list[Any] = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with Publisher([url], progress="off", deadlines=DEADLINES) as publisher:
        for turn in range(3):
            whole = {f"n{k}": torch.arange(12.0) + 100 * k + turn for k in range(8)}
            each = 12 // ranks
            weights = {
                name: LocalShard(t[each * rank : each * (rank + 1)], (12,), (each * rank,))
                for name, t in whole.items()
            }
            if turn == 1 and rank == culprit:
                _break_exchange(fault)
            started = time.monotonic()
            try:
                told.append(publisher.push(weights).version)
            except Exception as error:
                told.append((type(error).__name__, str(error), time.monotonic() - started))
    return told


def push_grid(url: str, name: str, trainer: str, told: dict[str, Any]) -> list[int]:
    """This rank's part of a declared model, of two seeds."""
    from grids import GridSource

    with Publisher([url], progress="off", deadlines=DEADLINES, **told) as publisher:
        return [
            publisher.push(GridSource(name, trainer, dist.get_rank(), seed)).version
            for seed in (1, 2)
        ]


def push_fleet(urls: list[str]) -> list[Any]:
    """Warm up, check, push, catch the second agent up, push again: what each told."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with Publisher(urls, policy="available", progress="off", deadlines=DEADLINES) as publisher:

        def weights(turn: int) -> dict[str, torch.Tensor]:
            named = [*range(rank, 8, ranks), 9]  # w9 is on all ranks
            return {f"w{k}": torch.full((64, 8), float(10 * turn + k)) for k in named}

        warm = publisher.warmup(weights(0))
        told = [[a.ok for a in warm.agents], len(warm.slowest)]
        told.append([a.ok for a in publisher.check()])
        report = publisher.push(weights(1))
        told.append([(a.ok, a.phase, a.code) for a in report.agents])
        told.append((report.rendezvous_s, publisher.catch_up(urls[1]).version))
        report = publisher.push(weights(2))
        told.append((report.rendezvous_s, report.version, [a.ok for a in report.agents]))
        return told


def end_in_push(url: str, how: str, culprit: int) -> list[Any]:
    """One rank gets a signal while it writes, as a scheduler sends it; all tell what they saw."""
    rank = dist.get_rank()
    number = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}[how]

    def leave(*_: object) -> None:
        raise KeyboardInterrupt if how == "ctrl-c" else SystemExit(143)

    signal.signal(number, leave)
    told: list[Any] = []
    with Publisher([url], progress="off", deadlines=DEADLINES) as publisher:
        for turn in range(3):
            weights = {f"w{rank}": torch.full((4, 4), float(turn))}
            if turn == 1 and rank == culprit:
                session = publisher._held.session
                write = session._peers.write  # type: ignore[union-attr]

                def struck(*args: Any, write: Any = write, **kwargs: Any) -> Any:
                    os.kill(os.getpid(), number)
                    return write(*args, **kwargs)

                session._peers.write = struck  # type: ignore[union-attr,method-assign]
            try:
                told.append(publisher.push(weights).version)
            except BaseException as error:
                told.append(type(error).__name__)
    return told
