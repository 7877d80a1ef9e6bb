"""The digest of many pieces of GPU memory in one launch; the bits are those of ``digest``.

Every program sums one chunk of one piece and adds its two sums to the piece's with 64-bit integer
atomics: sums modulo 2**64 do not depend on who comes first, so the result is deterministic.

A thread only adds: of the words ``w[0..K)`` that it reads it keeps the sum ``s``, and the sum ``c``
of all that ``s`` has been.  ``sum(k * w[k])`` is ``K * s - c``: one product for all of them.

The same pass tells whether a float has all bits of its exponent set.  With ``m`` the exponent's
bits in each lane of a word and ``l`` the lowest of them, ``(word & m) + l`` carries into the bit
above exactly in the lanes where all are set, and never into the next lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

#: words that a program reads at a time, and how often; a program sums 512 KiB
_TILE_WORDS = 2048
_TILES = 32
_NUM_WARPS = 8


@triton.jit
def _add_words(
    a: tl.tensor,
    before: tl.tensor,
    odd: tl.tensor,
    full: tl.tensor,
    word: tl.tensor,
    exponent: tl.tensor,
    lowest: tl.tensor,
    check: tl.constexpr,
) -> tl.tensor:
    left, right = tl.split(word.to(tl.uint64, bitcast=True))
    if check:
        full |= ((left & exponent) + lowest) | ((right & exponent) + lowest)
    a += left + right
    return a, before + a, odd + right, full


@triton.jit
def _digest_kernel(
    sums_ptr: tl.tensor,  # int64[2 * pieces]
    addr_ptr: tl.tensor,  # int64[pieces], multiples of 8
    nbytes_ptr: tl.tensor,  # int64[pieces]
    piece_ptr: tl.tensor,  # int32[programs]: whose chunk this is
    chunk_ptr: tl.tensor,  # int32[programs]: which of the piece's chunks
    exponent_ptr: tl.tensor,  # int64[pieces]: bits of the exponents in a word; 0: do not look
    full_ptr: tl.tensor,  # int32[1]: becomes 1 where an exponent is all ones
    check: tl.constexpr,
    tile_words: tl.constexpr,
    tiles: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    piece = tl.load(piece_ptr + pid)
    first = tl.load(chunk_ptr + pid).to(tl.int64) * (tile_words * tiles)
    address = tl.load(addr_ptr + piece)
    nbytes = tl.load(nbytes_ptr + piece)
    exponent = tl.load(exponent_ptr + piece).to(tl.uint64, bitcast=True)
    lowest = exponent & (exponent ^ (exponent << 1))
    # counted from the multiple of 16 bytes before the piece: its first `skew` words are not read
    skew = address % 16 // 8
    end = skew + nbytes // 8
    words_ptr = (address - address % 16).to(tl.pointer_type(tl.int64)) + first
    # this chunk's words, and its first ones that are skipped; 32-bit arithmetic from here on
    words = tl.minimum(end - first, tile_words * tiles).to(tl.int32)
    skip = tl.where(first == 0, skew, 0).to(tl.int32)
    # two neighbours a row: a thread reads 16 bytes and adds them up before it keeps a sum
    row = tl.arange(0, tile_words // 2)
    lane = 2 * row[:, None] + tl.arange(0, 2)[None, :]
    a = tl.zeros([tile_words // 2], dtype=tl.uint64)
    before = tl.zeros([tile_words // 2], dtype=tl.uint64)
    odd = tl.zeros([tile_words // 2], dtype=tl.uint64)
    full = tl.zeros([tile_words // 2], dtype=tl.uint64)
    head = 0
    if skip > 0:
        word = tl.load(words_ptr + lane, mask=(lane >= skip) & (lane < words), other=0)
        a, before, odd, full = _add_words(a, before, odd, full, word, exponent, lowest, check)
        head += tile_words
    whole = words // tile_words * tile_words
    for start in range(head, whole, tile_words):
        index = start + lane
        word = tl.load(tl.multiple_of(words_ptr + index, [1, 16]))
        a, before, odd, full = _add_words(a, before, odd, full, word, exponent, lowest, check)
    rest_at = tl.maximum(whole, head)
    index = rest_at + lane
    word = tl.load(words_ptr + index, mask=index < words, other=0)
    a, before, odd, full = _add_words(a, before, odd, full, word, exponent, lowest, check)
    read = (rest_at // tile_words + 1).to(tl.uint64)
    b = (a * read - before) * tile_words + a * (2 * row + 1).to(tl.uint64) + odd
    sum_a = tl.sum(a, axis=0)
    sum_b = tl.sum(b, axis=0)

    # the last one to seven bytes are a word of their own, at the end of the last chunk
    tail = tl.where(first + words == end, nbytes % 8, 0)
    byte = tl.arange(0, 8)
    bytes_ptr = (words_ptr + words).to(tl.pointer_type(tl.uint8)) + byte
    rest = tl.load(bytes_ptr, mask=byte < tail, other=0).to(tl.uint64)
    last = tl.sum(rest << (8 * byte).to(tl.uint64), axis=0)
    sum_a += last
    sum_b += last * (words + 1).to(tl.uint64)
    if check:
        carried = exponent + lowest  # where the bit above an exponent is
        found = tl.max(((full & carried) != 0).to(tl.int32)) | (
            (((last & exponent) + lowest) & carried) != 0
        ).to(tl.int32)
        if found > 0:
            tl.atomic_or(full_ptr, 1, sem="relaxed")

    sum_b += sum_a * (first - skew).to(tl.uint64)
    tl.atomic_add(sums_ptr + 2 * piece, sum_a.to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums_ptr + 2 * piece + 1, sum_b.to(tl.int64, bitcast=True), sem="relaxed")


class _Tables(NamedTuple):
    """What the kernel is told of some pieces."""

    programs: int
    addresses: torch.Tensor
    nbytes: torch.Tensor
    piece: torch.Tensor
    chunk: torch.Tensor
    exponents: torch.Tensor


class Scan:
    """Some pieces of one GPU's memory, digested again and again: each time is one launch.

    Pieces that do not start at a multiple of 8 bytes are copied first, each time.

    Args:
        pieces: Flat contiguous uint8 tensors.
        dtypes: Of the values in each piece, see :func:`knows`; None: nobody asks.
    """

    def __init__(
        self, pieces: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None
    ) -> None:
        self._pieces = pieces
        self._device = pieces[0].device
        self._check = dtypes is not None
        self._exponents = None if dtypes is None else tuple(map(_exponents, dtypes))
        self._known = None if any(p.data_ptr() % 8 for p in pieces) else self._tables(pieces)

    def _tables(self, pieces: Sequence[torch.Tensor]) -> _Tables:
        where = tuple((p.data_ptr(), p.numel()) for p in pieces)
        return _tables(where, self._exponents, _TILE_WORDS * _TILES, self._device)

    def queue(self) -> torch.Tensor:
        """Queue the kernel on the current stream; nothing waits for it.

        Returns:
            int64 on the device: the two sums of each piece, and what is not 0 if a value is NaN or
            infinite.
        """
        pieces = self._pieces
        if self._known is None:
            pieces = [p if p.data_ptr() % 8 == 0 else p.clone() for p in pieces]
        tables = self._known or self._tables(pieces)
        made = torch.zeros(2 * len(pieces) + 1, dtype=torch.int64, device=self._device)
        if tables.programs:
            with torch.cuda.device_of(made):
                _digest_kernel[(tables.programs,)](
                    made,
                    *tables[1:],
                    made[-1:].view(torch.int32),
                    check=self._check,
                    tile_words=_TILE_WORDS,
                    tiles=_TILES,
                    num_warps=_NUM_WARPS,
                )
        return made


@lru_cache(maxsize=8)
def _tables(
    pieces: tuple[tuple[int, int], ...],
    exponents: tuple[int, ...] | None,
    chunk_words: int,
    device: torch.device,
) -> _Tables:
    addresses, nbytes = np.array(pieces, dtype=np.int64).T.copy()
    # by whole words: a tail never makes a chunk of its own, but in a piece that has nothing else
    words = addresses % 16 // 8 + nbytes // 8
    chunks = np.where(nbytes > 0, np.maximum(-(-words // chunk_words), 1), 0)
    programs = int(chunks.sum())
    piece = np.repeat(np.arange(len(pieces)), chunks)
    chunk = np.arange(programs) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    looked = np.array(exponents or [0] * len(pieces), dtype=np.uint64).view(np.int64)
    tables = addresses, nbytes, piece.astype(np.int32), chunk.astype(np.int32), looked
    made = _Tables(programs, *(torch.from_numpy(t).to(device) for t in tables))
    if device.type == "cuda":  # the next use may be on another stream
        torch.cuda.current_stream(device).synchronize()
    return made


def knows(dtype: torch.dtype) -> bool:
    """Whether its values that are not finite are those with every bit of some pattern set."""
    return "fnuz" not in str(dtype)


@cache
def _exponents(dtype: torch.dtype) -> int:
    """The bits that all are set in NaN and infinity alone, in each lane of 64 bits; 0: no float."""
    if not dtype.is_floating_point:
        return 0
    # behind the largest value come infinity and NaN, or NaN alone
    largest = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    bits = int.from_bytes(largest.view(torch.uint8).numpy().tobytes(), "little") + 1
    return sum(bits << shift for shift in range(0, 64, 8 * dtype.itemsize))
