from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.families import CONFIGS, quantized

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
GRIDS: list[dict[str, Any]] = [
    {"tp": 1},
    {"tp": 2},
    {"tp": 4},
    {"tp": 8},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2},
    {"tp": 2, "dp": 2, "expert_parallel": True},
    {"tp": 4, "expert_parallel": True},
]
FP8 = ["qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"]


def all_cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for name, config in CONFIGS.items():
        for grid in GRIDS:
            key = f"{name}-bf16-{'-'.join(f'{k}{v}' for k, v in grid.items())}"
            cases[key] = {"config": config, "wire_dtype": "bf16", "grid": grid}
    for name in FP8:
        for grid in GRIDS:
            # The tiny DeepSeek's heads have no whole block for each of eight workers.
            if name != "deepseek_v3" or grid != {"tp": 8}:
                key = f"{name}-fp8-{'-'.join(f'{k}{v}' for k, v in grid.items())}"
                cases[key] = {"config": quantized(name), "wire_dtype": "fp8", "grid": grid}
    return cases


CASES = all_cases()


@cache
def answers() -> dict[str, dict[str, Any]]:
    """One vLLM process traces its own loader for all cases."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/vllm_layouts.py")],
        input=json.dumps(list(CASES.values())),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "server", "client"])},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_declared_layout_is_what_vllm_s_own_loader_does(case: str) -> None:
    answer = answers()[case]
    assert answer["copies"] > 10
    assert answer["found"] == []


@pytest.mark.parametrize("case", [case for case in CASES if "-bf16-" in case])
def test_a_commit_renews_the_attention_that_is_made_of_weights_and_no_other(case: str) -> None:
    answer = answers()[case]
    assert answer["attention"] > 0
    of_weights = case.startswith("deepseek")  # MLA
    assert answer["renewed"] == (answer["attention"] if of_weights else 0)
