"""Digests that are made where the bytes are: what a kernel writes need not be read again."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch

_WORD_NBYTES = 8

#: which of the pieces, and the word of it that a matrix begins at
Place = tuple[int, int]


class Ahead:
    """The sums of some pieces of GPU memory, as kernels add to them while they write the bytes.

    The same in every push of an epoch.  ``weightsync.quantize.prepare_each`` takes it, and
    ``weightsync.digest.scan`` reads the pieces that are not ``done`` in this push.

    Args:
        pieces: Flat contiguous uint8 tensors on one device; their addresses are kept, not they.

    Attributes:
        sums: int64[pieces, 2], see ``weightsync.digest``.
        full: int32[1]: 1 where some value is not finite.
        done: The pieces whose every byte is in ``sums``.
    """

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        device = pieces[0].device
        self.sums = torch.zeros(len(pieces), 2, dtype=torch.int64, device=device)
        self.full = torch.zeros(1, dtype=torch.int32, device=device)
        self.done: frozenset[int] = frozenset()
        spans = sorted((p.data_ptr(), p.data_ptr() + p.numel(), k) for k, p in enumerate(pieces))
        # bytes of two pieces would have to be added twice
        self._spans = [] if any(b[0] < a[1] for a, b in pairwise(spans)) else spans

    @classmethod
    def of(cls, pieces: Sequence[torch.Tensor]) -> Ahead | None:
        """None: no kernels are there that would add to it."""
        on_gpu = bool(pieces) and pieces[0].device.type == "cuda"
        return cls(pieces) if on_gpu and find_spec("triton") is not None else None

    def begin(self) -> None:
        """A fill starts; queued on the current stream."""
        self.sums.zero_()
        self.full.zero_()
        self.done = frozenset()

    def places(self, weights: Sequence[torch.Tensor]) -> list[Place | None]:
        """Where each matrix of bytes lies, which no two share.

        Returns:
            None: in a piece that has other bytes too, or beside the words of all pieces.
        """
        places = [self._place(weight) for weight in weights]
        nbytes: Counter[int] = Counter()
        for place, weight in zip(places, weights, strict=True):
            if place is not None:
                nbytes[place[0]] += weight.numel()
        whole = {k for start, stop, k in self._spans if nbytes[k] == stop - start}
        return [place if place is not None and place[0] in whole else None for place in places]

    def _place(self, weight: torch.Tensor) -> Place | None:
        step, one = weight.stride()
        at = bisect_right(self._spans, weight.data_ptr(), key=lambda span: span[0]) - 1
        if at < 0 or not weight.numel() or one != 1 or step < 0 or step % _WORD_NBYTES:
            return None
        start, stop, piece = self._spans[at]
        word, rest = divmod(weight.data_ptr() - start, _WORD_NBYTES)
        end = weight.data_ptr() + (weight.shape[0] - 1) * step + weight.shape[1]
        return None if rest or end > stop else (piece, word)
