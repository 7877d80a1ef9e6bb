from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantize_cases import KINDS, SHAPES, all_pairs, boxes, formula, mismatch
from tests.support.quantize_cases import random_weights as weights_of
from weightsync import quantize as q
from weightsync.errors import InputError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_formula(kind: str, shape: tuple[int, ...]) -> None:
    weights = weights_of(kind, shape, torch.bfloat16)
    assert not mismatch(q.quantize(weights), formula(weights))


def test_every_mantissa_under_every_amax_is_that_of_the_formula() -> None:
    weights = all_pairs()
    assert not mismatch(q.quantize(weights), formula(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_master_is_rounded_to_bfloat16_first(dtype: torch.dtype) -> None:
    master = weights_of("random", (256, 256), dtype)
    assert not mismatch(q.quantize(master), q.quantize(master.to(torch.bfloat16)))
    # and that is not what the master itself would give
    wide = master.float().view(2, 128, 2, 128)
    scale = wide.abs().amax(dim=(1, 3), keepdim=True) / torch.tensor(448.0)
    direct = (wide / scale).to(torch.float8_e4m3fn).view(256, 256)
    assert (direct.view(torch.uint8) != q.quantize(master).weight.view(torch.uint8)).any()


def test_an_all_zero_block_has_the_least_scale_and_no_nan() -> None:
    weight, scale_inv = q.quantize(torch.zeros(130, 130))
    assert (scale_inv == torch.tensor(1e-12)).all()
    assert (weight.float() == 0).all()


def test_small_weights_do_not_become_zero() -> None:
    weights = weights_of("tiny", (256, 256), torch.bfloat16)
    weight, scale_inv = q.quantize(weights)
    value = weight.float() * scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (value - weights.float()).abs()
    assert (error <= 2.0**-4 * weights.float().abs() + 2.0**-10 * scale_inv.max()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_shows_in_the_scale(value: float) -> None:
    weights = torch.ones(256, 128)
    weights[200, 5] = value
    assert torch.isfinite(q.quantize(weights).scale_inv).flatten().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 3, 4), (3, 0, 4)], ids=str)
def test_nothing_is_quantised_to_nothing(shape: tuple[int, ...]) -> None:
    weight, scale_inv = q.quantize(torch.zeros(shape))
    assert weight.shape == shape
    assert scale_inv.numel() == 0
    assert q.block_amax(torch.zeros(shape), (0, 100, 100)).numel() == 0


def test_strides_do_not_matter() -> None:
    weights = weights_of("random", (300, 280), torch.bfloat16)
    want = q.quantize(weights)
    padded = torch.zeros(300, 560, dtype=torch.bfloat16)
    padded[:, ::2] = weights
    assert not mismatch(q.quantize(weights.t().contiguous().t()), want)
    assert not mismatch(q.quantize(padded[:, ::2]), want)
    assert not mismatch(q.quantize(torch.nn.Parameter(weights)), want)


def test_a_large_tensor_goes_through_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of("random", (700, 200), torch.bfloat16)
    want = q.quantize(weights)
    monkeypatch.setattr(q, "_STRIP_NBYTES", 1)
    assert not mismatch(q.quantize(weights), want)
    amax = q.block_amax(weights[100:], (100, 0))
    got = q.quantize_with_scales(weights[100:], (100, 0), q.scales_from_amax(amax))
    assert torch.equal(got[28:].view(torch.uint8), want.weight[128:].view(torch.uint8))


def test_a_group_equals_its_tensors_one_by_one() -> None:
    stacked = weights_of("random", (3, 200, 144), torch.bfloat16)
    got = q.quantize(stacked)
    for e in range(3):
        assert not mismatch(q.Quantized(got.weight[e], got.scale_inv[e]), q.quantize(stacked[e]))
    listed = [stacked[0].clone(), stacked[1].t().contiguous().t(), stacked[2]]
    assert not mismatch(q.quantize(listed), got)


def test_results_land_in_the_memory_that_is_given() -> None:
    weights = weights_of("random", (200, 144), torch.bfloat16)
    want = q.quantize(weights)
    slot = torch.zeros(144, 200, dtype=torch.float8_e4m3fn).t()
    scales = torch.zeros(2, 4)[:, ::2]
    out = q.Quantized(slot, scales)
    assert q.quantize(weights, out=out) is out
    assert not mismatch(q.Quantized(slot, scales), want)
    slot.zero_()
    assert q.quantize_with_scales(weights, (0, 0), scales, out=slot) is slot
    assert not mismatch(q.Quantized(slot, scales), want)


@st.composite
def _sharded(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int]]:
    rows, cols = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in (rows, cols)]
    kind = draw(st.sampled_from(sorted(KINDS)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    return weights_of(kind, (rows, cols), dtype), cuts[0], cuts[1]


@settings(max_examples=60)
@given(_sharded())
def test_shards_that_exchange_amax_equal_the_whole(
    case: tuple[torch.Tensor, list[int], list[int]],
) -> None:
    whole, rows, cols = case
    want = q.quantize(whole)
    amax = torch.zeros_like(want.scale_inv)
    for offset, where in boxes(rows, cols):
        part = amax[q.touched_blocks(whole[where].shape, offset)]
        torch.maximum(part, q.block_amax(whole[where], offset), out=part)
    scales = q.scales_from_amax(amax)
    weight = torch.empty_like(want.weight)
    for offset, where in boxes(rows, cols):
        mine = scales[q.touched_blocks(whole[where].shape, offset)]
        weight[where] = q.quantize_with_scales(whole[where], offset, mine)
    assert not mismatch(q.Quantized(weight, scales), want)


def test_shards_of_a_group_take_the_offset_of_their_box() -> None:
    whole = weights_of("random", (3, 256, 300), torch.bfloat16)
    want = q.quantize(whole)
    box, offset = whole[1:, 128:, 256:], (1, 128, 256)
    rows, cols = q.touched_blocks(box.shape, offset)
    scales = q.scales_from_amax(q.block_amax(box, offset))
    got = q.Quantized(q.quantize_with_scales(box, offset, scales), scales)
    part = q.Quantized(want.weight[1:, 128:, 256:], want.scale_inv[1:, rows, cols])
    assert not mismatch(got, part)


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        (torch.zeros(4), "shape (4,)"),
        (torch.zeros(1, 2, 3, 4), "shape (1, 2, 3, 4)"),
        (torch.zeros(4, 4, dtype=torch.int32), "torch.int32"),
        (torch.zeros(4, 4, dtype=torch.float64), "torch.float64"),
        ([], "empty"),
        ([torch.zeros(4, 4), torch.zeros(4, 5)], "(4, 5)"),
        ([torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bfloat16)], "torch.bfloat16"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_is_refused_by_name(weights: q.Weights, what: str) -> None:
    with pytest.raises(InputError) as error:
        q.quantize(weights)
    assert what in str(error.value)


def test_memory_and_scales_of_another_shape_are_refused() -> None:
    weights = torch.zeros(200, 200)
    with pytest.raises(InputError, match="scales must be"):
        q.quantize_with_scales(weights, (100, 0), torch.ones(2, 2))
    with pytest.raises(InputError, match=r"out\.weight must be"):
        q.quantize(weights, out=q.Quantized(torch.zeros(200, 200), torch.ones(2, 2)))


def _round_to_float32(exact: Fraction) -> np.float32:
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - exact), int(f.view(np.uint32)) & 1))


@pytest.mark.parametrize("scale", [None, 1e-12], ids=["from_amax", "floor"])
def test_one_newton_step_gives_the_correctly_rounded_quotient(scale: float | None) -> None:
    """The kernels' division on GPUs, for every mantissa of a value and of an amax.

    A power of two changes neither rounding, as nothing under- or overflows where e4m3 is not 0.
    """
    x = (1 + np.arange(128, dtype=np.float32) / 128)[None, :]
    amax = (1 + np.arange(128, dtype=np.float32) / 128)[:, None]
    s = amax / np.float32(448) if scale is None else np.full((1, 1), scale, np.float32)
    want = x / s  # IEEE
    r = np.float32(1) / s
    near = x * r
    # a float64 holds the product of two float32 exactly, and here the difference, too: both
    # fused steps round once, as on the GPU
    remainder = np.float32(np.float64(x) - np.float64(near) * np.float64(s))
    step = np.float64(remainder) * np.float64(r)
    for at in np.ndindex(*want.shape):
        exact = Fraction(float(step[at])) + Fraction(float(near[at]))
        assert _round_to_float32(exact) == want[at], at
