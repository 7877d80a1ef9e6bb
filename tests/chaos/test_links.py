"""The links between trainer, agent and engine break, stand still, or lose what comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.conftest import OPTIONS
from tests.chaos.moments import BOUND_S, DEADLINES, settled, strike, what_is_served
from tests.chaos.proxy import Link
from tests.chaos.rows import CONTROL, ENGINE, Row
from tests.support.stack import Daemon, Stack

pytestmark = [pytest.mark.nixl, pytest.mark.chaos, pytest.mark.timeout(240)]


class Behind:
    """An engine that is reached through a link."""

    def __init__(self, engine: Daemon, link: Link) -> None:
        self._engine = engine
        self.url = link.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("row", CONTROL, ids=lambda row: row.id)
def test_the_link_between_trainer_and_agent(row: Row, stack: Stack) -> None:
    link = Link(stack.agent.port)
    try:
        run(row, stack, link, through=link.url)
    finally:
        link.close()


@pytest.fixture(scope="module")
def engine_link(engine: Daemon) -> Iterator[Link]:
    link = Link(engine.port)
    yield link
    link.close()


@pytest.fixture(scope="module")
def _behind(
    checkpoint: Path, engine: Daemon, engine_link: Link, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("behind")
    behind: Any = Behind(engine, engine_link)
    stack = Stack(checkpoint, folder, behind, OPTIONS, DEADLINES)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture
def behind(_behind: Stack) -> Stack:
    _behind.heal()
    return _behind


@pytest.mark.parametrize("row", ENGINE, ids=lambda row: row.id)
def test_the_link_between_agent_and_engine(row: Row, behind: Stack, engine_link: Link) -> None:
    run(row, behind, engine_link)


def run(row: Row, stack: Stack, link: Link, *, through: str | None = None) -> None:
    stack.push()
    held = stack.held()
    started = time.monotonic()
    struck = strike(
        stack,
        row.when,
        lambda: link.become(row.how, loses=row.loses),
        through=through,
    )
    link.become("pass")
    assert struck.how in row.told, repr(struck.error)
    served = what_is_served(stack, settled(stack), held.version)
    assert time.monotonic() - started < BOUND_S
    assert served in row.ends
    if served == "old":
        stack.assert_serves(held)
    elif served == "torn":
        stack.assert_torn()
    else:
        stack.assert_holds(struck.weights, stack.status()["version"])
    stack.assert_a_whole_push_works()
