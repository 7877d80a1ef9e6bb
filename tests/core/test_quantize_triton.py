"""The Triton kernels, run by Triton's interpreter, give the bytes of the formula."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.kernel_checks import CHECKS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    # Triton decides on import whether it interprets: a process of its own
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_checks"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_kernels_agree_to_the_bit(name: str, found: dict[str, str]) -> None:
    assert not found[name]
