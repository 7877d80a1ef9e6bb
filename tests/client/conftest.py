from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from reference import Agent

from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import Deadlines, Publisher

#: short enough for a test, long enough for two busy cores
QUICK = Deadlines(
    connect_s=2, status_s=5, rendezvous_s=10, pause_s=5, begin_s=5, write_s=5, commit_s=10,
    resume_s=5, abort_s=5, grace_s=0.5,
)  # fmt: skip


@pytest.fixture
def fabric() -> Fabric:
    return Fabric()


@pytest.fixture
def make_agent(fabric: Fabric) -> Iterator[Callable[..., Agent]]:
    made: list[Agent] = []

    def make(**options: Any) -> Agent:
        made.append(Agent(fabric, **options))
        return made[-1]

    yield make
    for agent in made:
        agent.close()


@pytest.fixture
def agent(make_agent: Callable[..., Agent]) -> Agent:
    return make_agent()


@pytest.fixture
def make_publisher(fabric: Fabric) -> Iterator[Callable[..., Publisher]]:
    made: list[Publisher] = []

    def make(*agents: Agent | str, **options: Any) -> Publisher:
        urls = [a if isinstance(a, str) else a.url for a in agents]
        options = {
            "transport": partial(InMemoryTransport, fabric, "trainer"),
            "progress": "off",
            "deadlines": QUICK,
            **options,
        }
        made.append(Publisher(urls, **options))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32)).to(torch.bfloat16)
