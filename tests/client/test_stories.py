"""What others lived through with trainers and their ranks, and can't be here."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from jobs import same_error, same_report, sharded
from reference import Agent

from weightsync.errors import NonFiniteError, ProtocolMismatchError
from weightsync_client import Publisher

Make = Callable[..., Publisher]


def test_story_one_rank_in_a_collective_alone(agent: Agent, make_job, weights) -> None:
    """Elsewhere a rank that skipped a non-finite step left the others for half an hour."""
    shards = sharded(weights, 3)
    job = make_job(agent, ranks=3)
    same_report(job.push(shards))
    whole = {k: torch.full_like(t, float("nan")) for k, t in weights.items()}
    started = time.monotonic()
    same_error(job.push([shards[0], sharded(whole, 3)[1], shards[2]]), NonFiniteError, 0)
    assert time.monotonic() - started < 10
    assert agent.generating
    assert same_report(job.push(shards)).version == 2


def test_story_a_trainer_that_starts_again_goes_on_counting(
    agent: Agent, make_publisher: Make, model: torch.nn.Module
) -> None:
    """Elsewhere the version went back from 57 to 1 with the trainer's restart."""
    assert make_publisher(agent).push(model, version=57).version == 57
    assert make_publisher(agent).push(model).version == 58


def test_story_a_proxy_that_says_200_for_an_agent(
    agent: Agent, make_publisher: Make, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere HTTP 200 was taken for success, whatever it carried."""
    publisher = make_publisher(agent)
    publisher.push(model)
    call = type(publisher._held.fleet.agents[0])._exchange

    def lying(self, method, path, body, deadline):
        status, raw = call(self, method, path, body, deadline)
        if path == "/commit_update":
            return 200, b'{"error": "out of memory"}'
        return status, raw

    monkeypatch.setattr(type(publisher._held.fleet.agents[0]), "_exchange", lying)
    with pytest.raises(ProtocolMismatchError, match="/commit_update"):
        publisher.push(model)
    monkeypatch.undo()
    assert publisher.push(model).version >= 3
