"""One engine for all tests here, one agent a module, and every test starts from ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Ran, Run, invoke, save_in_two
from tests.support.models import make_model
from tests.support.stack import QUICK, Daemon, Stack, new_engine
from weightsync_client import Deadlines


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    engine = new_engine(checkpoint, tmp_path_factory.mktemp("engine") / "engine.log")
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def agent_options() -> Sequence[str]:
    """A module's own options of its agent."""
    return ()


@pytest.fixture(scope="module")
def publisher_options() -> Mapping[str, Any]:
    """A module's own options of its trainer."""
    return {}


@pytest.fixture(scope="module")
def deadlines() -> Deadlines:
    """A module's own deadlines of its trainer."""
    return QUICK


@pytest.fixture(scope="module")
def _stack(
    checkpoint: Path,
    engine: Daemon,
    agent_options: Sequence[str],
    deadlines: Deadlines,
    publisher_options: Mapping[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    stack = Stack(checkpoint, folder, engine, agent_options, deadlines, publisher_options)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture
def stack(_stack: Stack) -> Stack:
    _stack.heal()
    return _stack


@pytest.fixture
def run(stack: Stack) -> Run:
    """A command with the agent's token in a file."""

    def call(*arguments: object) -> Ran:
        return invoke(*arguments, "--token-file", stack.folder / "token")

    return call


@pytest.fixture
def second(stack: Stack, tmp_path: Path) -> Path:
    """Another checkpoint of the same model, in two files."""
    return save_in_two(stack.weights(), stack.checkpoint, tmp_path / "second")
