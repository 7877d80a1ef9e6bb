"""The one place that decides which tests run on this machine.

``gpu`` and ``nixl`` tests are skipped where the hardware or the library is missing. ``vllm``,
``slow`` and ``chaos`` tests take minutes, ``integrations`` tests need packages that .venv has not:
they run only when ``-m`` names their marker (``make test-vllm``, ``make test-slow``, ``make
test-chaos``, ``make test-integrations``).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import pytest
from hypothesis import settings

from tests.support.browser import chromium

# A background job of a shell ignores Ctrl-C, and so would the processes that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine's clock says nothing about the code; pytest-timeout ends what hangs.
settings.register_profile("weightsync", deadline=None, print_blob=True)
settings.load_profile("weightsync")

ONLY_WHEN_NAMED = {
    "slow": "make test-slow",
    "vllm": "make test-vllm",
    "chaos": "make test-chaos",
    "integrations": "make test-integrations",
}


@cache
def missing(marker: str) -> str | None:
    """Returns what this machine lacks for tests with this marker, or None if it lacks nothing."""
    if marker in {"nixl", "vllm"} and find_spec(marker) is None:
        return f"{marker} is not installed"
    if marker == "browser" and (find_spec("playwright") is None or chromium() is None):
        return "no playwright, or no chromium on the PATH"
    if marker == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "no CUDA device"
    return None


def named_in(expression: str, marker: str) -> bool:
    """Whether a ``-m`` expression names the marker."""
    return re.search(rf"\b{marker}\b", expression) is not None


def reason_to_skip(markers: set[str], expression: str) -> str | None:
    """Why a test with these markers does not run under this ``-m`` expression, or None."""
    held_back = [marker for marker in ONLY_WHEN_NAMED if marker in markers]
    if held_back and not any(named_in(expression, marker) for marker in held_back):
        return f"{held_back[0]}: {ONLY_WHEN_NAMED[held_back[0]]}"
    for marker in ("gpu", "nixl", "vllm", "browser"):
        if marker in markers and (lack := missing(marker)) is not None:
            return lack
    return None


@pytest.fixture(scope="session", autouse=True)
def _no_journal_of_an_earlier_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ports come again: an agent must not find what another test's agent wrote down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        markers = {mark.name for mark in item.iter_markers()}
        reason = reason_to_skip(markers, config.option.markexpr)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
