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
