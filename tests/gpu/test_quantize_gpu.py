"""The kernels on a real GPU: every check of the interpreter, and what only a GPU has."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_checks import GPU_CHECKS
from tests.support.quantize_cases import formula, mismatch
from tests.support.quantize_cases import random_weights as weights_of
from weightsync import quantize as q
from weightsync import quantize_triton
from weightsync.digest import digests

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", GPU_CHECKS)
def test_kernels_agree_to_the_bit(name: str, gpu: torch.device) -> None:
    words = GPU_CHECKS[name](gpu)
    assert not words, words


@pytest.mark.parametrize("name", GPU_CHECKS)
def test_kernels_for_gpus_without_fp8_agree_to_the_bit(
    name: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_triton, "_casts_natively", lambda device: False)
    words = GPU_CHECKS[name](gpu)
    assert not words, words


def test_plain_torch_on_a_gpu_agrees_to_the_bit(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(q, "_kernels", lambda device: None)
    weights = weights_of("wide", (700, 400), torch.float32)
    words = mismatch(q.quantize(weights.to(gpu)), formula(weights))
    assert not words, words


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1e4])
def test_a_large_random_tensor_equals_the_one_of_the_cpu(scale: float, gpu: torch.device) -> None:
    weights = (torch.randn(4096, 7168, device=gpu) * scale).to(torch.bfloat16)
    words = mismatch(q.quantize(weights), q.quantize(weights.cpu()))
    assert not words, words


def test_a_group_past_two_to_the_31_elements_is_addressed_right(gpu: torch.device) -> None:
    experts = torch.empty(160, 2048, 7168, dtype=torch.bfloat16, device=gpu).normal_(std=0.02)
    got = q.quantize(experts)
    for e in (0, 1, 79, 146, 147, 159):  # 2**31 elements end in expert 146
        want = q.quantize(experts[e].cpu())
        words = mismatch(q.Quantized(got.weight[e], got.scale_inv[e]), want)
        assert not words, f"expert {e}: {words}"


def test_kernels_are_queued_on_the_current_stream(gpu: torch.device) -> None:
    weights = weights_of("random", (2048, 2048), torch.bfloat16)
    stream = torch.cuda.Stream(gpu)
    with torch.cuda.stream(stream):
        there = torch.zeros(2048, 2048, dtype=torch.bfloat16, device=gpu)
        torch.cuda._sleep(50_000_000)
        there.copy_(weights.pin_memory(), non_blocking=True)
        got = q.quantize(there)
        found = digests([got.weight.view(torch.uint8).flatten()])
    stream.synchronize()
    want = q.quantize(weights)
    assert not mismatch(got, want)
    assert found == digests([want.weight.view(torch.uint8).flatten()])


def test_digests_of_large_pieces_equal_those_of_the_cpu(gpu: torch.device) -> None:
    memory = torch.randint(0, 256, (200_000_003,), dtype=torch.uint8, device=gpu)
    cuts = [(0, 200_000_003), (16, 100_000_000), (4, 99_999_999), (1, 50_000_000)]
    cuts += [(4096 * i, 4096 * i + 4000) for i in range(2000)]
    here = memory.cpu()
    got = digests([memory[a:b] for a, b in cuts])
    want = digests([here[a:b] for a, b in cuts])
    bad = [cut for cut, a, b in zip(cuts, got, want, strict=True) if a != b]
    assert not bad, f"{len(bad)} of {len(cuts)} differ: {bad[:5]}"
