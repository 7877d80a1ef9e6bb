"""Training jobs whose ranks are threads, one publisher each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from reference import QUICK, Agent
from thread_ranks import ThreadRanks, Wire, on_all

from weightsync.errors import WeightSyncError
from weightsync.transport.base import Transport
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import LocalShard, Publisher
from weightsync_client.report import PushReport


class Job:
    """The ranks of a training job, one publisher each."""

    def __init__(
        self,
        fabric: Fabric,
        monkeypatch: pytest.MonkeyPatch,
        fleet: list[Agent],
        world_size: int,
        *,
        transports: dict[int, Callable[[], Transport]] | None = None,
        apart_s: float = 10.0,
        **options: Any,
    ) -> None:
        wire = Wire(world_size)
        self.publishers = []
        for rank in range(world_size):
            ranks = ThreadRanks(wire, rank, apart_s=apart_s)
            monkeypatch.setattr(
                "weightsync_client.publisher.make_ranks", lambda *_, r=ranks, **__: r
            )
            make = partial(InMemoryTransport, fabric, f"trainer{rank}")
            self.publishers.append(
                Publisher(
                    **{"agents": [a.url for a in fleet], "deadlines": QUICK, **options},
                    transport=(transports or {}).get(rank, make),
                    progress="off",
                )
            )

    def push(self, tensors: list[Any], versions: list[int | None] | None = None) -> list[Any]:
        """Every rank pushes its own; the reports or errors."""
        versions = [None] * len(tensors) if versions is None else versions
        return on_all(
            [
                partial(p.push, t, v)
                for p, t, v in zip(self.publishers, tensors, versions, strict=True)
            ]
        )


def rows(whole: torch.Tensor, ranks: int) -> list[LocalShard]:
    """Cut by rows as torch.chunk does; the last ones may be empty."""
    parts = list(whole.chunk(ranks))
    parts += [whole[:0]] * (ranks - len(parts))
    out, at = [], 0
    for part in parts:
        out.append(LocalShard(part, tuple(whole.shape), (at, *[0] * (whole.ndim - 1))))
        at += len(part)
    return out


def sharded(tensors: Mapping[str, torch.Tensor], ranks: int) -> list[dict[str, LocalShard]]:
    cut = {name: rows(t, ranks) for name, t in tensors.items()}
    return [{name: parts[r] for name, parts in cut.items()} for r in range(ranks)]


def same_report(results: list[Any]) -> PushReport:
    assert all(isinstance(r, PushReport) for r in results), results
    assert all(r == results[0] for r in results)
    return results[0]


def same_error(results: list[Any], kind: type[WeightSyncError], rank: int) -> WeightSyncError:
    assert [type(r) for r in results] == [kind] * len(results), results
    assert {r.context["rank"] for r in results} == {rank}
    assert {str(r) for r in results} == {str(results[0])}
    assert f"rank {rank}" in str(results[0])
    assert {r.context["phase"] for r in results} == {results[0].context["phase"]}
    assert {r.__notes__[-1] for r in results} == {results[0].__notes__[-1]}
    return results[0]
