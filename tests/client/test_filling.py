"""Matrices are quantised where they are sent from, and the bytes are those of the whole."""

from __future__ import annotations

import pytest
import torch

from tests.support.quantize_cases import mismatch, random_weights
from weightsync.quantize import Quantized, quantize
from weightsync_client import QuantizationSpec, StateDictSource
from weightsync_client.borders import merge
from weightsync_client.filling import Copy, Job, Round
from weightsync_client.quantized import QuantizedSource

N, K = 300, 400
FP8 = torch.float8_e4m3fn


def part(rows: slice, cols: slice) -> Copy:
    """That much of a matrix, as a plan has it: whole rows are one run."""
    n, k = rows.stop - rows.start, cols.stop - cols.start
    size = (n * k,) if k == K else (n, k)
    slot = torch.zeros(size, dtype=torch.uint8).view(FP8)
    return slot, size, (1,) if k == K else (K, 1), rows.start * K + cols.start


ALL_ROWS, ALL_COLS = slice(0, N), slice(0, K)
#: where a matrix goes, and whether it is quantised there
CASES = {
    "whole": ([(ALL_ROWS, ALL_COLS)], True),
    "rows": ([(slice(0, 128), ALL_COLS), (slice(128, N), ALL_COLS)], True),
    "columns": ([(ALL_ROWS, slice(0, 256)), (ALL_ROWS, slice(256, K))], True),
    "a part": ([(slice(0, 128), ALL_COLS)], False),
    "twice": ([(slice(0, 256), ALL_COLS), (slice(0, 256), ALL_COLS)], False),
    "cut rows": ([(slice(0, 100), ALL_COLS), (slice(100, N), ALL_COLS)], False),
    "cut columns": ([(ALL_ROWS, slice(0, 200)), (ALL_ROWS, slice(200, K))], False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slots_have_the_bytes_of_the_whole_matrix_however_it_is_split(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights("wide", (N, K), dtype)
    parts, straight = CASES[case]
    norm = torch.randn(7)
    given = StateDictSource({"a.weight": weights, "norm": norm})
    source = QuantizedSource(given, QuantizationSpec())
    values = Job("a.weight", 0, FP8, [part(*p) for p in parts])
    slots = values.slots
    scales, rest = torch.zeros(3, 4), torch.zeros(7)
    jobs = [
        Job("a.weight_scale_inv", 0, torch.float32, [(scales, (3, 4), (4, 1), 0)]),
        Job("norm", 0, torch.float32, [(rest, (7,), (1,), 0)]),
        values,
    ]
    want = quantize(weights)
    all_jobs = Round(jobs)
    if straight:
        monkeypatch.setattr(QuantizedSource, "_fp8", lambda *_: pytest.fail("made aside"))
    for _ in range(2):
        source.learn(merge([source.findings()]))
        all_jobs.fill(source)
        assert bool(values.blocks) == straight
        assert torch.equal(rest, norm)
        for (rows, cols), slot in zip(parts, slots, strict=True):
            got = slot.view(torch.uint8).view(rows.stop - rows.start, -1)
            assert torch.equal(got, want.weight.view(torch.uint8)[rows, cols])
            slot.view(torch.uint8).zero_()
        assert torch.equal(scales, want.scale_inv)


def test_a_destination_with_strides_of_its_own_is_quantised_in_place() -> None:
    weights = random_weights("random", (N, K), torch.bfloat16)
    source = QuantizedSource(StateDictSource({"a.weight": weights}), QuantizationSpec())
    source.learn(merge([source.findings()]))
    turned = torch.zeros(K, N, dtype=torch.uint8).view(FP8).t()
    job = Job("a.weight", 0, FP8, [(turned, (N, K), (K, 1), 0)])
    Round([job]).fill(source)
    assert job.blocks
    assert not mismatch(Quantized(turned, source.local("a.weight_scale_inv", 0)), quantize(weights))
