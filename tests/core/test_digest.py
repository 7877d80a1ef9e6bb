from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync.digest import digest_sums, digests
from weightsync.errors import InputError

_MEMORY = torch.randint(0, 256, (3 << 20,), dtype=torch.uint8, generator=torch.Generator())


def by_definition(data: bytes) -> bytes:
    words = struct.unpack(f"<{-(-len(data) // 4)}I", data + bytes(-len(data) % 4))
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


def test_sums_wrap_without_a_trace() -> None:
    ones = torch.full((2 << 20,), 255, dtype=torch.uint8)
    n = ones.numel() // 4
    word = 2**32 - 1
    want = struct.pack("<QQ", n * word % 2**64, n * (n + 1) // 2 * word % 2**64)
    assert digests([ones]) == [want]


def test_a_word_changed_or_two_exchanged_change_the_digest() -> None:
    data = _MEMORY[:4096].clone()
    before = digests([data])
    data[17] ^= 1
    assert digests([data]) != before
    data[17] ^= 1
    swapped = data.view(-1, 4)[[1, 0, *range(2, 1024)]].reshape(-1)
    assert not torch.equal(swapped, data)
    assert digests([swapped]) != before


def test_what_is_not_flat_bytes_is_refused() -> None:
    assert digests([]) == []
    for wrong in (_MEMORY[::2], _MEMORY[:16].view(4, 4), _MEMORY[:16].view(torch.int32)):
        with pytest.raises(InputError, match="flat contiguous uint8"):
            digests([_MEMORY, wrong])
