"""Digests and the finite check of CPU memory, in one pass over it; the bits are ``digest``'s.

A tile of the words is a matrix that stays in the caches.  The sums of its rows and those of its
columns give both sums of the digest without a product for every word: additions of words are what
numpy does at the rate of the memory.  The largest value of the tile, read as signed and as
unsigned integers, tells whether a float in it has all bits of its exponent set: infinities and
NaNs are the largest of their sign in that order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

_MASK64 = (1 << 64) - 1
_COLUMNS = 512
#: 1 MiB a tile
_TILE_NBYTES = 8 * _COLUMNS * 256
#: what a thread takes at a time, and the least that is worth a second thread
_SHARE_NBYTES = 16 * _TILE_NBYTES

#: pieces up to this are digested together, so many at a time that they stay in the caches
_SMALL_NBYTES = 8 << 10
_SMALL_PIECES = 32

_COLUMN = np.arange(1, _COLUMNS + 1, dtype=np.uint64)


_Bytes: TypeAlias = npt.NDArray[np.uint8]
_Check: TypeAlias = Callable[[_Bytes], bool]


class _Share(NamedTuple):
    """Bytes of a piece, from ``start`` on."""

    piece: int
    start: int
    data: _Bytes
    check: _Check | None


class _Sums(NamedTuple):
    piece: int
    a: int
    b: int
    finite: bool


def scan(
    pieces: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None
) -> tuple[list[bytes], bool]:
    """See :func:`weightsync.digest.scan`; not more threads work than torch may use."""
    memory = [p.numpy() for p in pieces]
    checks = [None] * len(pieces) if dtypes is None else [_finite(dtype) for dtype in dtypes]
    shares = [
        _Share(k, start, memory[k][start : start + _SHARE_NBYTES], checks[k])
        for k in range(len(pieces))
        for start in range(0, memory[k].size, _SHARE_NBYTES)
    ]
    small = [s for s in shares if s.data.size <= _SMALL_NBYTES and not (s.start or s.data.size % 8)]
    if len(small) > 1:
        shares = [s for s in shares if s.data.size > _SMALL_NBYTES or s.start or s.data.size % 8]
    else:
        small = []
    threads = min(torch.get_num_threads(), sum(m.size for m in memory) // _SHARE_NBYTES)
    each = _pool(threads).map(_scan, shares) if threads > 1 else map(_scan, shares)
    together = (
        _scan_together(small[k : k + _SMALL_PIECES]) for k in range(0, len(small), _SMALL_PIECES)
    )
    found = chain(each, chain.from_iterable(together))
    return _joined(found, len(pieces))


def _joined(found: Iterable[_Sums], count: int) -> tuple[list[bytes], bool]:
    a, b, finite = [0] * count, [0] * count, True
    for sums in found:
        a[sums.piece] += sums.a
        b[sums.piece] += sums.b
        finite &= sums.finite
    return [struct.pack("<QQ", x & _MASK64, y & _MASK64) for x, y in zip(a, b, strict=True)], finite


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "weightsync-digest")


@cache
def _finite(dtype: torch.dtype) -> _Check | None:
    """What tells whether every value of a tile is finite; None: of this type all are."""
    if not dtype.is_floating_point:
        return None
    signed, unsigned = f"<i{dtype.itemsize}", f"<u{dtype.itemsize}"
    if "fnuz" in str(dtype):  # the one NaN is where minus zero would be
        return lambda tile: bool(np.minimum.reduce(tile.view(signed)) > -128)
    # behind the largest value come infinity and NaN, or NaN alone
    largest = torch.tensor([torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
    positive = int.from_bytes(largest.view(torch.uint8).numpy().tobytes(), "little") + 1
    negative = positive | 1 << (8 * dtype.itemsize - 1)
    return lambda tile: bool(
        np.maximum.reduce(tile.view(signed)) < positive
        and np.maximum.reduce(tile.view(unsigned)) < negative
    )


def _scan(given: _Share) -> _Sums:
    piece, start, share, check = given
    a = b = 0
    finite = True
    for first in range(0, share.size, _TILE_NBYTES):
        tile = share[first : first + _TILE_NBYTES]
        finite = finite and (check is None or check(tile))
        rest = tile.size % (8 * _COLUMNS)
        whole = tile[: tile.size - rest]
        word = (start + first) // 8
        for part in (whole, _padded(tile[tile.size - rest :])) if rest else (whole,):
            matrix = part.view("<u8").reshape(-1, _COLUMNS)
            of_rows = np.add.reduce(matrix, axis=1)
            row = np.arange(len(matrix), dtype=np.uint64)
            # arrays wrap without a word; numpy's scalars would warn
            total = int(np.add.reduce(of_rows))
            a += total
            b += word * total + _COLUMNS * int(np.dot(row, of_rows))
            b += int(np.dot(_COLUMN, np.add.reduce(matrix, axis=0)))
            word += part.size // 8
    return _Sums(piece, a, b, finite)


def _scan_together(shares: Sequence[_Share]) -> Iterator[_Sums]:
    """Norms and biases: their words one behind another, since calls cost more than bytes."""
    sizes = np.array([share.data.size // 8 for share in shares])
    starts = np.cumsum(sizes) - sizes
    words = np.concatenate([share.data.view("<u8") for share in shares])
    place = np.arange(1, words.size + 1, dtype=np.uint64) - np.repeat(starts, sizes).astype("<u8")
    of_check: dict[_Check | None, list[_Bytes]] = {}
    for share in shares:
        of_check.setdefault(share.check, []).append(share.data)
    finite = all(c is None or c(np.concatenate(data)) for c, data in of_check.items())
    sums = np.add.reduceat(words, starts), np.add.reduceat(words * place, starts)
    for share, a, b in zip(shares, *(column.tolist() for column in sums), strict=True):
        yield _Sums(share.piece, a, b, finite)


def _padded(rest: _Bytes) -> _Bytes:
    row = np.zeros(8 * _COLUMNS, dtype=np.uint8)
    row[: rest.size] = rest
    return row
