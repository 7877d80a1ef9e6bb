"""A digest of bytes that any device computes alike, in one pass and in any order.

The bytes are little-endian 32-bit words ``w[0..n)``, zero-padded.  Two sums modulo 2**64::

    a = sum(w[i])        b = sum((i + 1) * w[i])

and the digest is ``a`` and ``b``, little-endian, 16 bytes.  It is Fletcher's construction
(J. Fletcher, 1982) with wide words: ``b`` sees any two words exchanged, ``a`` any single one
changed.  Sums modulo 2**64 do not depend on the order of reduction, so every device and every
kernel agrees bit for bit.  It finds accidents; it is no defence against an attacker.

Three implementations, one result: :func:`digest_sums` in plain torch operations (the reference,
any device), numpy's matrix product on the CPU, a Triton kernel on GPUs (``digest_triton``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightsync.errors import InputError

DIGEST_NBYTES = 16
_CHUNK_WORDS = 1 << 20
_MASK64 = (1 << 64) - 1

#: Words of a row on the CPU.  A row's sum of (c + 1) * word is below 2**32 * 1024 * 1025 / 2 <
#: 2**52, so that float64 holds it, and every partial sum, exactly.
_ROW_WORDS = 1024
#: rows turned into float64 at a time: 2 MiB, which stays in the caches
_TILE_ROWS = 256


def digest_sums(data: torch.Tensor) -> torch.Tensor:
    """The two sums of a flat contiguous uint8 tensor, as int64[2] on its device.

    No host synchronisation happens here, so many can be queued and read at once.
    """
    tail = data.numel() % 4
    words = data[: data.numel() - tail]
    # int32 reads need 4-byte alignment, which slots and kernel tensors have; all else is copied
    if words.data_ptr() % 4 or words.storage_offset() % 4:
        words = words.clone()
    words = words.view(torch.int32)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    index = torch.arange(1, min(words.numel(), _CHUNK_WORDS) + 1, device=data.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        # int32 -> int64 sign-extends; masking keeps the words unsigned
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64).bitwise_and_(0xFFFFFFFF)
        total = chunk.sum()
        sums[0] += total
        sums[1] += torch.mul(chunk, index[: chunk.numel()]).sum() + start * total
    if tail:
        last = torch.zeros(4, dtype=torch.uint8, device=data.device)
        last[:tail] = data[data.numel() - tail :]
        word = last.view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF)[0]
        sums[0] += word
        sums[1] += (words.numel() + 1) * word
    return sums


def digests(pieces: Sequence[torch.Tensor]) -> list[bytes]:
    """The 16-byte digest of each flat contiguous uint8 tensor, all on one device; one host sync.

    Any start address and any number of bytes will do; multiples of 16 are the fastest on a GPU.

    Raises:
        InputError: A piece is not flat contiguous uint8, or lies on another device than the first.
    """
    if not pieces:
        return []
    device = pieces[0].device
    for p in pieces:
        if p.dtype != torch.uint8 or p.dim() != 1 or not p.is_contiguous() or p.device != device:
            raise InputError(
                f"a digest is of flat contiguous uint8 tensors on one device ({device}), got "
                f"{p.dtype} of shape {tuple(p.shape)} and strides {p.stride()} on {p.device}",
                hint="view the memory as bytes first",
            )
    if device.type == "cpu":
        return _cpu_digests(pieces)
    if device.type == "cuda" and find_spec("triton") is not None:
        from weightsync import digest_triton

        sums = digest_triton.digest_sums(pieces)
    else:
        sums = torch.stack([digest_sums(p) for p in pieces])
    rows: list[list[int]] = sums.tolist()
    return [struct.pack("<qq", a, b) for a, b in rows]


def _cpu_digests(pieces: Sequence[torch.Tensor]) -> list[bytes]:
    """Each digest from exact float64 matrix products, five times as fast as integer sums.

    A row of 1,024 words times the columns ``1`` and ``1, 2, 3, ...`` gives the row's two sums; the
    rows' sums are then added as wrapping integers.  All values are below 2**53, so that no order
    of additions in the matrix product rounds.
    """
    weights = np.stack([np.ones(_ROW_WORDS), np.arange(1.0, _ROW_WORDS + 1)], axis=1)
    tile = np.empty((_TILE_ROWS, _ROW_WORDS))
    return [_cpu_digest(p.numpy(), weights, tile) for p in pieces]


def _cpu_digest(
    data: npt.NDArray[np.uint8], weights: npt.NDArray[Any], tile: npt.NDArray[Any]
) -> bytes:
    nrows, rest = divmod(data.size, 4 * _ROW_WORDS)
    # numpy reads words at any address
    rows = data[: data.size - rest].view("<u4").reshape(nrows, _ROW_WORDS)
    a = b = 0
    for first in range(0, nrows, _TILE_ROWS):
        part = rows[first : first + _TILE_ROWS]
        wide = tile[: len(part)]
        np.copyto(wide, part)
        a, b = _add_rows(a, b, wide @ weights, first)
    if rest:
        last = np.zeros(4 * _ROW_WORDS, dtype=np.uint8)
        last[:rest] = data[data.size - rest :]
        a, b = _add_rows(a, b, last.view("<u4").astype(np.float64)[None] @ weights, nrows)
    return struct.pack("<QQ", a, b)


def _add_rows(a: int, b: int, sums: npt.NDArray[Any], first: int) -> tuple[int, int]:
    exact = sums.astype(np.uint64)
    before = np.arange(first, first + len(exact), dtype=np.uint64) * np.uint64(_ROW_WORDS)
    a += int(exact[:, 0].sum())
    b += int(exact[:, 1].sum()) + int((before * exact[:, 0]).sum())
    return a & _MASK64, b & _MASK64
