from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import Agent
from torch import nn

from weightsync_client import Deadlines, Publisher


@pytest.mark.nixl
def test_pushes_over_nixl_land_and_reuse_the_session(
    make_agent: Callable[..., Agent], model: nn.Module
) -> None:
    from weightsync.transport.nixl import NixlTransport

    agent = make_agent(n_workers=2, make_transport=lambda: NixlTransport("worker"))
    with Publisher([agent.url], progress="off", deadlines=Deadlines(write_s=20)) as publisher:
        for version in (1, 2, 3):
            with torch.no_grad():
                model[0].weight.normal_()
            assert publisher.push(model).version == version
            for worker in agent.workers:
                landed = worker.tensor("0.weight", torch.bfloat16, (32, 16))
                assert torch.equal(landed, model[0].weight)
    assert agent.calls.count("/init_transfer") == 1


@pytest.mark.nixl
def test_rounds_over_nixl_land_whole(make_agent: Callable[..., Agent]) -> None:
    from weightsync.transport.nixl import NixlTransport

    agent = make_agent(n_workers=2, make_transport=lambda: NixlTransport("worker"))
    weights = {f"w{k}": torch.randn(50_000 + k) for k in range(8)}
    with Publisher(
        [agent.url], progress="off", deadlines=Deadlines(write_s=20), max_slot_bytes=200_000
    ) as publisher:
        for version in (1, 2):
            for tensor in weights.values():
                tensor.normal_()
            report = publisher.push(weights)
            assert (report.version, report.rounds) == (version, 17)
            for worker in agent.workers:
                for name, tensor in weights.items():
                    assert torch.equal(worker.tensor(name, torch.float32, tensor.shape), tensor)
