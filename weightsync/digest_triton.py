"""The digest of many pieces of GPU memory in one launch; the bits are those of ``digest``.

Every program sums one chunk of one piece and adds its two sums to the piece's with 64-bit integer
atomics: sums modulo 2**64 do not depend on who comes first, so the result is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

#: words that a program reads at a time, and how often; a program sums 512 KiB
_TILE_WORDS = 2048
_TILES = 32
_NUM_WARPS = 8


@triton.jit
def _add_words(a: tl.tensor, b: tl.tensor, word: tl.tensor, index: tl.tensor) -> tl.tensor:
    wide = word.to(tl.uint64, bitcast=True)
    factor = (index + 1).to(tl.uint32).to(tl.uint64)
    return a + tl.sum(wide, axis=1), b + tl.sum(wide * factor, axis=1)


@triton.jit
def _digest_kernel(
    sums_ptr: tl.tensor,  # int64[pieces, 2]
    addr_ptr: tl.tensor,  # int64[pieces], multiples of 8
    nbytes_ptr: tl.tensor,  # int64[pieces]
    piece_ptr: tl.tensor,  # int32[programs]: whose chunk this is
    chunk_ptr: tl.tensor,  # int32[programs]: which of the piece's chunks
    tile_words: tl.constexpr,
    tiles: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    piece = tl.load(piece_ptr + pid)
    first = tl.load(chunk_ptr + pid).to(tl.int64) * (tile_words * tiles)
    address = tl.load(addr_ptr + piece)
    nbytes = tl.load(nbytes_ptr + piece)
    # counted from the multiple of 16 bytes before the piece: its first `skew` words are not read
    skew = address % 16 // 8
    end = skew + nbytes // 8
    words_ptr = (address - address % 16).to(tl.pointer_type(tl.int64)) + first
    # this chunk's words, and its first ones that are skipped; 32-bit arithmetic from here on
    words = tl.minimum(end - first, tile_words * tiles).to(tl.int32)
    skip = tl.where(first == 0, skew, 0).to(tl.int32)
    # two neighbours a row: a thread reads 16 bytes and adds them up before it keeps a sum
    lane = 2 * tl.arange(0, tile_words // 2)[:, None] + tl.arange(0, 2)[None, :]
    a = tl.zeros([tile_words // 2], dtype=tl.uint64)
    b = tl.zeros([tile_words // 2], dtype=tl.uint64)
    head = 0
    if skip > 0:
        word = tl.load(words_ptr + lane, mask=(lane >= skip) & (lane < words), other=0)
        a, b = _add_words(a, b, word, lane)
        head += tile_words
    whole = words // tile_words * tile_words
    for start in range(head, whole, tile_words):
        index = start + lane
        word = tl.load(tl.multiple_of(words_ptr + index, [1, 16]))
        a, b = _add_words(a, b, word, index)
    index = tl.maximum(whole, head) + lane
    word = tl.load(words_ptr + index, mask=index < words, other=0)
    a, b = _add_words(a, b, word, index)
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

    sum_b += sum_a * (first - skew).to(tl.uint64)
    tl.atomic_add(sums_ptr + 2 * piece, sum_a.to(tl.int64, bitcast=True), sem="relaxed")
    tl.atomic_add(sums_ptr + 2 * piece + 1, sum_b.to(tl.int64, bitcast=True), sem="relaxed")


def digest_sums(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The two sums of each flat contiguous uint8 tensor, as int64[pieces, 2] on their device.

    The kernel is queued on the current stream; nothing waits for it.  Pieces that do not start at
    a multiple of 8 bytes are copied first.
    """
    device = pieces[0].device
    pieces = [p if p.data_ptr() % 8 == 0 else p.clone() for p in pieces]
    sums = torch.zeros(len(pieces), 2, dtype=torch.int64, device=device)
    addresses = np.array([p.data_ptr() for p in pieces], dtype=np.int64)
    nbytes = np.array([p.numel() for p in pieces], dtype=np.int64)
    # by whole words: a tail never makes a chunk of its own, but in a piece that has nothing else
    words = addresses % 16 // 8 + nbytes // 8
    chunks = np.where(nbytes > 0, np.maximum(-(-words // (_TILE_WORDS * _TILES)), 1), 0)
    programs = int(chunks.sum())
    if not programs:
        return sums
    piece = np.repeat(np.arange(len(pieces)), chunks)
    chunk = np.arange(programs) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    with torch.cuda.device_of(sums):
        _digest_kernel[(programs,)](
            sums,
            _upload(addresses, device),
            _upload(nbytes, device),
            _upload(piece.astype(np.int32), device),
            _upload(chunk.astype(np.int32), device),
            tile_words=_TILE_WORDS,
            tiles=_TILES,
            num_warps=_NUM_WARPS,
        )
    return sums


def _upload(table: Any, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
