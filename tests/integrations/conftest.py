"""The stack of the end-to-end tests: a torch engine, an agent, and what a test asks of them."""

from __future__ import annotations

from tests.e2e.conftest import *  # noqa: F403 - all its fixtures, also those that come
from tests.e2e.conftest import _stack  # noqa: F401
