"""The stack of the end-to-end tests: a torch engine, an agent, and what a test asks of them."""

from __future__ import annotations

from tests.e2e.conftest import (  # noqa: F401
    _stack,
    agent_options,
    checkpoint,
    deadlines,
    engine,
    stack,
)
