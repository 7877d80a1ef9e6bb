"""One engine for all faults, one agent a module; every case starts from ready."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.chaos.moments import DEADLINES, IDLE_S, STEP_S
from tests.e2e.conftest import (  # noqa: F401
    _stack,
    checkpoint,
    engine,
    publisher_options,
    stack,
)
from weightsync_client import Deadlines

OPTIONS = ["--engine-timeout-s", str(STEP_S), "--push-idle-timeout-s", str(IDLE_S)]


@pytest.fixture(scope="module")
def agent_options() -> Sequence[str]:
    return OPTIONS


@pytest.fixture(scope="module")
def deadlines() -> Deadlines:
    return DEADLINES
