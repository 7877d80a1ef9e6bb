from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync import digest_cpu
from weightsync.digest import all_finite, digest_sums, digests, scan
from weightsync.errors import InputError

FLOATS = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip

_MEMORY = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator())


def by_definition(data: bytes) -> bytes:
    words = struct.unpack(f"<{-(-len(data) // 8)}Q", data + bytes(-len(data) % 8))
    a = sum(words) % 2**64
    b = sum((i + 1) * w for i, w in enumerate(words)) % 2**64
    return struct.pack("<QQ", a, b)


@given(start=st.integers(0, 40), nbytes=st.integers(0, 20_000))
def test_a_digest_is_the_one_of_the_definition(start: int, nbytes: int) -> None:
    piece = _MEMORY[start : start + nbytes]
    assert digests([piece]) == [by_definition(piece.numpy().tobytes())]


@pytest.mark.parametrize("start", [0, 1, 4])
@pytest.mark.parametrize("nbytes", [4 << 18, (4 << 18) - 1, (4 << 18) + 4097, 3_000_001])
def test_all_implementations_agree_on_large_pieces(start: int, nbytes: int) -> None:
    piece = _MEMORY[start : start + nbytes]
    assert digests([piece]) == [struct.pack("<qq", *digest_sums(piece).tolist())]


def test_many_small_pieces_have_the_digests_that_each_has_alone() -> None:
    sizes = [8, 16, 7, 4096, 8192, 8200, 0, 24, 1, 40_000, *range(0, 2000, 8)]
    pieces = [_MEMORY[at : at + nbytes] for at, nbytes in zip(range(0, 10**6, 24), sizes)]  # noqa: B905
    assert digests(pieces) == [by_definition(p.numpy().tobytes()) for p in pieces]
    values = [torch.ones(64, dtype=dtype) for dtype in FLOATS[:4]] * 40
    dtypes = [v.dtype for v in values]
    assert scan([v.view(torch.uint8) for v in values], dtypes)[1]
    for k in (0, 3, 159):
        values[k][7] = float("inf")
        assert not scan([v.view(torch.uint8) for v in values], dtypes)[1]
        values[k][7] = 1


def test_sums_wrap_without_a_trace() -> None:
    ones = torch.full((2 << 20,), 255, dtype=torch.uint8)
    n = ones.numel() // 8
    word = 2**64 - 1
    want = struct.pack("<QQ", n * word % 2**64, n * (n + 1) // 2 * word % 2**64)
    assert digests([ones]) == [want]


def test_a_word_changed_or_two_exchanged_change_the_digest() -> None:
    data = _MEMORY[:4096].clone()
    before = digests([data])
    data[17] ^= 1
    assert digests([data]) != before
    data[17] ^= 1
    swapped = data.view(-1, 8)[[1, 0, *range(2, 512)]].reshape(-1)
    assert not torch.equal(swapped, data)
    assert digests([swapped]) != before


def test_what_is_not_flat_bytes_is_refused() -> None:
    assert digests([]) == []
    for wrong in (_MEMORY[::2], _MEMORY[:16].view(4, 4), _MEMORY[:16].view(torch.int32)):
        with pytest.raises(InputError, match="flat contiguous uint8"):
            digests([_MEMORY, wrong])


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [_MEMORY[start:] for start in (0, 8, 5)]
    want = digests(pieces)
    monkeypatch.setattr(digest_cpu, "_SHARE_NBYTES", 1 << 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert digests(pieces) == want
    assert digest_cpu._pool.cache_info().currsize


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """All values of a small type, and the special ones of a wide one."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    largest = torch.finfo(dtype).max
    specials = [0.0, -0.0, 1.0, -1e30, largest, -largest, float("inf"), float("-inf"), float("nan")]
    quiet = torch.tensor([-float("nan"), 5e-324], dtype=dtype)
    return torch.cat([torch.tensor(specials, dtype=dtype), quiet])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_finite_checks_agree_with_isfinite_on_every_value_of_a_dtype(
    dtype: torch.dtype,
) -> None:
    values = values_of(dtype)
    finite = torch.isfinite(values.to(torch.float64))
    asked = [values[finite], *(torch.stack([values[0], v]) for v in values[~finite][::31])]
    asked += [v[None] for v in values[:: len(values) // 8]]
    for some in asked:
        want = bool(torch.isfinite(some.to(torch.float64)).all())
        assert bool(all_finite(some)) == want
        found, here = scan([some.view(torch.uint8)], [dtype])
        assert (found, here) == (digests([some.view(torch.uint8)]), want)


def test_one_value_anywhere_in_a_large_piece_is_found() -> None:
    ones = torch.ones(3_000_001, dtype=torch.bfloat16)
    for at in (0, 524_287, 524_288, 3_000_000):
        for value in (float("nan"), float("inf"), float("-inf")):
            ones[at] = value
            assert not scan([ones.view(torch.uint8)], [torch.bfloat16])[1]
            assert scan([ones.view(torch.uint8)], [torch.int16])[1]
            assert scan([ones.view(torch.uint8)], None)[1]
        ones[at] = 1.0
    assert scan([ones.view(torch.uint8)], [torch.bfloat16])[1]
