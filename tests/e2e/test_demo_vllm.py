"""``weightsync demo`` with a real vLLM: pushed weights equal a fresh load, to the last bit."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import Kind, config_of
from weightsync_client.demo import DemoOptions, DemoResult, run_demo

pytestmark = [pytest.mark.nixl, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def marked_slow(test):
    """A minute or more each: one test, below, runs wherever vLLM is, the others when asked for."""
    return pytest.mark.vllm(pytest.mark.slow(test))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The demo's processes find the packages where this one does."""
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))


def demo(kind: Kind, folder: Path, **options: Any) -> DemoResult:
    path = folder / "config.json"
    config_of(kind).to_json_file(path)
    result = run_demo(
        DemoOptions(config_file=path, workdir=folder / "demo", timeout_s=500, **options)
    )
    assert result.ok, result.error
    assert result.engine.startswith("vllm ")
    assert len(result.pushes) == 3
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    assert result.direct + result.staged == result.kernel_tensors > 0
    return result


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_packed_qwen3_equals_a_fresh_load(tmp_path):
    result = demo("qwen3", tmp_path, packed=True)
    assert result.staged > 0


@marked_slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3_moe"])
def test_packed_weights_are_staged_and_equal_a_fresh_load(kind, tmp_path):
    result = demo(kind, tmp_path, packed=True)
    assert result.staged > 0


@marked_slow
@pytest.mark.parametrize("kind", ["qwen3", "llama", "llama_tied"])
def test_plain_weights_are_written_in_place_and_equal_a_fresh_load(kind, tmp_path):
    result = demo(kind, tmp_path, packed=False)
    assert result.staged == 0


@marked_slow
def test_plain_experts_are_packed_all_the_same_and_staged(tmp_path):
    result = demo("qwen3_moe", tmp_path, packed=False)
    assert result.staged > 0


@marked_slow
def test_two_tensor_parallel_workers_equal_a_fresh_load(tmp_path):
    demo("qwen3", tmp_path, packed=True, tp=2)


@marked_slow
@pytest.mark.parametrize("kind", ["qwen3", "llama_tied"])
def test_two_fsdp2_ranks_into_two_tensor_parallel_workers_equal_a_fresh_load(kind, tmp_path):
    demo(kind, tmp_path, trainer_ranks=2, tp=2)
