"""Pushes into a real vLLM on GPUs, its CUDA graphs captured, equal a fresh load."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.models import Kind, config_of
from weightsync_client.demo import DemoOptions, run_demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.nixl,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.mark.parametrize("kind", ["qwen3", "llama_tied", "qwen3_moe"])
def test_push_into_cuda_graphs_is_direct_and_equals_a_fresh_load(kind: Kind, tmp_path: Path):
    path = tmp_path / "config.json"
    config_of(kind).to_json_file(path)
    result = run_demo(
        DemoOptions(config_file=path, device="cuda", workdir=tmp_path / "demo", timeout_s=390)
    )
    assert result.ok, result.error
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    assert (result.direct, result.staged, result.refused) == (result.kernel_tensors, 0, 0)
    assert result.kernel_tensors > 0


@pytest.mark.parametrize("kind", ["qwen3", "llama_tied", "qwen3_moe"])
def test_a_bf16_trainer_feeds_an_fp8_engine_what_a_fresh_load_of_fp8_has(
    kind: Kind, tmp_path: Path
):
    path = tmp_path / "config.json"
    config_of(kind).to_json_file(path)
    result = run_demo(
        DemoOptions(
            config_file=path,
            device="cuda",
            quantization="fp8",
            workdir=tmp_path / "demo",
            timeout_s=390,
        )
    )
    assert result.ok, result.error
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    assert result.refused == 0
