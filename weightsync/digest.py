"""A digest of bytes that any device computes alike, in one pass and in any order.

The bytes are little-endian 32-bit words ``w[0..n)``, zero-padded.  Two sums modulo 2**64::

    a = sum(w[i])        b = sum((i + 1) * w[i])

and the digest is ``a`` and ``b``, little-endian, 16 bytes.  It is Fletcher's construction
(J. Fletcher, 1982) with wide words: ``b`` sees any two words exchanged, ``a`` any single one
changed.  Sums modulo 2**64 do not depend on the order of reduction, so every device and every
kernel agrees bit for bit.  It finds accidents; it is no defence against an attacker.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

DIGEST_NBYTES = 16
_CHUNK_WORDS = 1 << 20


def digest_sums(data: torch.Tensor) -> torch.Tensor:
    """The two sums of a flat contiguous uint8 tensor, as int64[2] on its device.

    No host synchronisation happens here, so many can be queued and read at once.
    """
    tail = data.numel() % 4
    words = data[: data.numel() - tail]
    # int32 reads need 4-byte alignment, which slots and kernel tensors have; anything else is copied
    if words.data_ptr() % 4:
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
    """The 16-byte digest of each flat contiguous uint8 tensor, all on one device; one host sync."""
    if not pieces:
        return []
    rows: list[list[int]] = torch.stack([digest_sums(p) for p in pieces]).tolist()
    return [struct.pack("<qq", a, b) for a, b in rows]
