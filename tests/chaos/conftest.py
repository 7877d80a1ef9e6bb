"""One engine and one agent for a module's faults; every case starts from ready."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.moments import DEADLINES, IDLE_S, STEP_S
from tests.support.models import make_model
from tests.support.stack import Daemon, Stack, new_engine

OPTIONS = ["--engine-timeout-s", str(STEP_S), "--push-idle-timeout-s", str(IDLE_S)]


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
def _stack(
    checkpoint: Path, engine: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    stack = Stack(checkpoint, tmp_path_factory.mktemp("stack"), engine, OPTIONS, DEADLINES)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture
def stack(_stack: Stack) -> Stack:
    _stack.heal()
    return _stack
