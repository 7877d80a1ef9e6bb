"""A warm-up, a push and a catch-up between GPU memories: real NIXL, a torch engine each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.models import make_model
from tests.support.stack import QUICK, Daemon, Stack
from weightsync.transport.slow_path import SlowPathWarning
from weightsync_client import Publisher

pytestmark = [pytest.mark.gpu, pytest.mark.nixl, pytest.mark.timeout(300)]


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[list[Stack]]:
    checkpoint = make_model("qwen3", tmp_path / "model", seed=0)
    made: list[Stack] = []
    engines: list[Daemon] = []
    try:
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            options = ["--model", str(checkpoint), "--device", "cuda"]
            module = "weightsync_server.engines.torch_host"
            engines.append(Daemon(module, options, folder / "engine.log", alive="/health"))
            engines[-1].start()
            made.append(Stack(checkpoint, folder, engines[-1], (), QUICK))
        for stack in made:
            stack.engine.wait_alive(120)
            stack.agent.start()
            stack.agent.wait_alive()
            stack.wait_for_state("ready", 60)
        yield made
    finally:
        for stack in made:
            stack.close()
        for engine in engines:
            engine.stop()


def test_a_warmup_over_the_fast_path_is_quick_and_a_newcomer_catches_up(
    stacks: list[Stack],
) -> None:
    first, second = stacks
    weights = {name: t.cuda() for name, t in first.weights().items()}
    with Publisher(
        [first.agent.url], token="a-token-for-the-tests", deadlines=QUICK, progress="off"
    ) as publisher:
        before = first.held()
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            report = publisher.warmup(weights)
        assert report.agents[0].ok
        assert report.slowest[0].seconds < 0.05
        first.assert_serves(before)
        version = publisher.push(weights).version
        for tensor in weights.values():
            tensor.add_(1)
        torch.cuda.synchronize()
        assert publisher.catch_up(second.agent.url).version == version
    assert second.held().sha256 == first.held().sha256
