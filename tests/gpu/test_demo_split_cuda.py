"""Sharded trainers into split CUDA engines, their graphs captured, equal a fresh load.

Two GPUs are enough: trainer rank and engine worker share one where there are no more.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import Kind, config_of
from weightsync_client.demo import DemoOptions, run_demo


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.nixl,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]


def demo(kind: Kind, folder: Path, **options: Any) -> None:
    if _gpus() < 2:
        pytest.skip("two GPUs are needed")
    path = folder / "config.json"
    config_of(kind).to_json_file(path)
    result = run_demo(
        DemoOptions(
            config_file=path,
            device="cuda",
            pushes=2,
            workdir=folder / "demo",
            timeout_s=390,
            **options,
        )
    )
    assert result.ok, result.error
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    assert result.refused == 0


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["qwen3", "llama_tied", "qwen3_moe"])
def test_two_fsdp2_ranks_over_nccl_equal_a_fresh_load(kind: Kind, tp: int, tmp_path: Path):
    demo(kind, tmp_path, trainer_ranks=2, tp=tp)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_two_fsdp2_ranks_feed_an_fp8_engine(kind: Kind, tmp_path: Path):
    demo(kind, tmp_path, trainer_ranks=2, quantization="fp8")


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("qwen3", {"pp": 2}),
        ("llama_tied", {"pp": 2}),
        ("qwen3", {"dp": 2}),
        ("qwen3_moe", {"tp": 2, "expert_parallel": True}),
        ("qwen3_moe", {"dp": 2}),
        ("qwen3_moe", {"dp": 2, "expert_parallel": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_every_worker_of_a_split_engine_equals_a_fresh_load(
    kind: Kind, split: dict[str, Any], tmp_path: Path
):
    demo(kind, tmp_path, **split)


@pytest.mark.parametrize("one_agent", [False, True], ids=["an agent each", "one agent"])
def test_two_engines_equal_a_fresh_load(one_agent: bool, tmp_path: Path):
    demo("qwen3", tmp_path, replicas=2, one_agent=one_agent)
