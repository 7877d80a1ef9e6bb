from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from jobs import Job
from reference import QUICK, Agent

from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import Publisher


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

    def make(*agents: Any, **options: Any) -> Publisher:
        urls: Any = [a.url if isinstance(a, Agent) else a for a in agents]
        if len(urls) == 1 and not str(urls[0]).startswith("http"):
            (urls,) = urls  # what names the agents
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


@pytest.fixture
def make_job(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(*agents: Agent, ranks: int, **options: Any) -> Job:
        made.append(Job(fabric, monkeypatch, list(agents), ranks, **options))
        return made[-1]

    yield make
    for job in made:
        for publisher in job.publishers:
            publisher.close()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(7, 5), "b": torch.randn(2, 3).bfloat16(), "c": torch.randn(12)}
