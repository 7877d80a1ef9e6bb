"""A digest of bytes that any device computes alike, in one pass and in any order.

The bytes are little-endian 64-bit words ``w[0..n)``, zero-padded.  Two sums modulo 2**64::

    a = sum(w[i])        b = sum((i + 1) * w[i])

and the digest is ``a`` and ``b``, little-endian, 16 bytes.  It is Fletcher's construction
(J. Fletcher, 1982) with wide words.  ``a`` sees any single word changed.  ``b`` sees words ``i``
and ``j`` exchanged, unless ``(i - j) * (w[i] - w[j])`` is a multiple of 2**64: a chance of
``2**k / 2**64`` where the distance is an odd multiple of ``2**k`` words.  Sums modulo 2**64 do not
depend on the order of reduction, so every device and every kernel agrees bit for bit.  It finds
accidents; it is no defence against an attacker.

Three implementations, one result: :func:`digest_sums` in plain torch operations (the reference,
any device), numpy's sums of rows and columns on the CPU (``digest_cpu``), a Triton kernel on GPUs
(``digest_triton``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from weightsync import digest_cpu
from weightsync.errors import InputError

_WORD_NBYTES = 8
_CHUNK_WORDS = 1 << 20
_REST_S = 50e-6
#: elements that a check turns into wider ones at a time
_CHUNK_ELEMS = 1 << 22


def digest_sums(data: torch.Tensor) -> torch.Tensor:
    """The two sums of a flat contiguous uint8 tensor, as int64[2] on its device.

    No host synchronisation happens here, so many can be queued and read at once.
    """
    tail = data.numel() % _WORD_NBYTES
    words = data[: data.numel() - tail]
    # int64 reads need 8-byte alignment, which slots and most kernel tensors have; all else is
    # copied
    if words.data_ptr() % _WORD_NBYTES or words.storage_offset() % _WORD_NBYTES:
        words = words.clone()
    words = words.view(torch.int64)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    index = torch.arange(1, min(words.numel(), _CHUNK_WORDS) + 1, device=data.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        total = chunk.sum()  # int64 wraps as uint64 does
        sums[0] += total
        sums[1] += torch.mul(chunk, index[: chunk.numel()]).sum() + start * total
    if tail:
        last = torch.zeros(_WORD_NBYTES, dtype=torch.uint8, device=data.device)
        last[:tail] = data[data.numel() - tail :]
        word = last.view(torch.int64)[0]
        sums[0] += word
        sums[1] += (words.numel() + 1) * word
    return sums


def digests(
    pieces: Sequence[torch.Tensor], meanwhile: Callable[[], object] = lambda: None
) -> list[bytes]:
    """The 16-byte digest of each flat contiguous uint8 tensor, all on one device; one host sync.

    Any start address and any number of bytes will do; multiples of 16 are the fastest on a GPU.

    Args:
        pieces: The tensors.
        meanwhile: Called once: while a GPU computes, where one does.

    Raises:
        InputError: A piece is not flat contiguous uint8, or lies on another device than the first.
    """
    return scan(pieces, None, meanwhile)[0]


def scan(
    pieces: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype] | None,
    meanwhile: Callable[[], object] = lambda: None,
) -> tuple[list[bytes], bool]:
    """:func:`digests`, and whether every value is finite, in the same pass.

    Args:
        pieces: See :func:`digests`.
        dtypes: Of the values in each piece; ``None``: nobody asks.
        meanwhile: See :func:`digests`.

    Returns:
        The digests, and whether no value is NaN or infinite (True where nobody asks).
    """
    return Scan(pieces, dtypes).run(meanwhile)


class Scan:
    """:func:`scan` of the same memory again and again: what can be known of it is, from here on.

    It keeps the pieces, and so their memory, alive.

    Args:
        pieces: See :func:`digests`.
        dtypes: See :func:`scan`.

    Raises:
        InputError: See :func:`digests`.
    """

    def __init__(
        self, pieces: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype] | None
    ) -> None:
        self._pieces = pieces
        self._dtypes = dtypes
        self._device = device = pieces[0].device if pieces else torch.device("cpu")
        self._queue: Callable[[], torch.Tensor] | None = None
        #: the shortest time that a GPU took; 0: none did
        self._best_s = 0.0
        for p in pieces:
            flat = p.dtype == torch.uint8 and p.dim() == 1 and p.is_contiguous()
            if not flat or p.device != device:
                raise InputError(
                    f"a digest is of flat contiguous uint8 tensors on one device ({device}), got "
                    f"{p.dtype} of shape {tuple(p.shape)} and strides {p.stride()} on {p.device}",
                    hint="view the memory as bytes first",
                )
        if device.type == "cuda" and find_spec("triton") is not None:
            from weightsync import digest_triton

            if dtypes is None or all(map(digest_triton.knows, dtypes)):
                self._queue = digest_triton.Scan(pieces, dtypes).queue

    def run(self, meanwhile: Callable[[], object] = lambda: None) -> tuple[list[bytes], bool]:
        """What the memory holds now: see :func:`scan`."""
        if self._queue is not None:
            made = self._queue()
            self._wait(meanwhile)
            found = made.cpu()
            return _packed(found[:-1]), not found[-1].item()
        pieces, dtypes = self._pieces, self._dtypes
        if self._device.type == "cpu":
            meanwhile()
            return digest_cpu.scan(pieces, dtypes) if pieces else ([], True)
        flags = [
            all_finite(p.view(dtype))
            for p, dtype in zip(pieces, dtypes or (), strict=dtypes is not None)
            if p.numel() and dtype.is_floating_point
        ]
        sums = torch.stack([digest_sums(p) for p in pieces])
        meanwhile()
        return _packed(sums), bool(torch.stack(flags).all()) if flags else True

    def _wait(self, meanwhile: Callable[[], object]) -> None:
        """Until the GPU is done.  CUDA's own wait keeps a core busy, which others have use for."""
        started_s = time.monotonic()
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        meanwhile()
        while not done.query():
            left_s = started_s + self._best_s - time.monotonic()
            time.sleep(max(left_s / 2, _REST_S))  # few looks before the end is near
        took_s = time.monotonic() - started_s
        self._best_s = min(self._best_s or took_s, took_s)


def _packed(sums: torch.Tensor) -> list[bytes]:
    """The digests of an int64 tensor of sums, two for each piece."""
    raw = sums.cpu().numpy().astype("<i8", copy=False).tobytes()
    return [raw[k : k + 16] for k in range(0, len(raw), 16)]


def all_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether all of a flat tensor is finite, as a bool scalar on its device.

    The extremes of a tensor are NaN if any value is, and infinite if any is: one exact pass, ten
    times as fast as asking each value.
    """
    if values.dtype.itemsize == 1:  # fp8 has no reductions
        parts = torch.split(values, _CHUNK_ELEMS)
        return torch.stack([torch.isfinite(p.to(torch.float32)).all() for p in parts]).all()
    low, high = torch.aminmax(values)
    return torch.isfinite(low) & torch.isfinite(high)
