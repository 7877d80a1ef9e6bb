"""Exchange the bytes of pairs of tensors without a third copy of them.

On one GPU a single kernel reads both sides and writes both (``exchange_triton``); elsewhere a small
buffer takes one side's bytes out of the way, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from weightsync_server.receiver.exchange_triton import Launch

#: bytes of the buffer: small enough for a CPU's caches, large enough for a bus or a kernel launch
_CPU_CHUNK_NBYTES = 1 << 20
_GPU_CHUNK_NBYTES = 64 << 20
#: the kernel moves so many bytes at a time; what a pair has beyond that goes the other way
_KERNEL_NBYTES = 16

Pair = tuple[torch.Tensor, torch.Tensor]


class Exchange:
    """Exchanges the two sides of each pair, and takes back what it has done of it.

    Args:
        pairs: Flat contiguous uint8 tensors of equal length; the first ones are all on one device.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        device = pairs[0][0].device if pairs else torch.device("cpu")
        self._kernel = _kernel(pairs)
        self._chunks = _chunks(pairs, device, with_heads=self._kernel is None)
        nbytes = max((a.numel() for a, _ in self._chunks), default=0)
        self._bounce = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.nbytes = sum(a.numel() for a, _ in pairs)
        self.reset()

    def reset(self) -> None:
        """Forget what was exchanged: it stays so."""
        self._kernel_ran = False
        self._done = 0
        self._halfway = False

    @torch.no_grad()
    def run(self) -> None:
        """Exchange all.  On a GPU the work is queued on the current stream, nothing waits for it.

        After an error some pairs are exchanged and others are not; see :meth:`undo`.
        """
        if self._kernel is not None:
            self._kernel.run()
            self._kernel_ran = True
        while self._done < len(self._chunks):
            self._swap(*self._chunks[self._done])
            self._done += 1

    @torch.no_grad()
    def undo(self) -> None:
        """Put the first side of every pair back to what it was before :meth:`run`, whole or not.

        After an error nothing is known any more.
        """
        if self._halfway:
            # its first side may be half written; what it held is in the buffer
            first, _ = self._chunks[self._done]
            first.copy_(self._bounce[: first.numel()], non_blocking=True)
        while self._done:
            self._done -= 1
            self._swap(*self._chunks[self._done])
        if self._kernel_ran and self._kernel is not None:
            self._kernel.run()
        self.reset()

    def _swap(self, a: torch.Tensor, b: torch.Tensor) -> None:
        aside = self._bounce[: a.numel()]
        aside.copy_(a, non_blocking=True)
        self._halfway = True
        a.copy_(b, non_blocking=True)
        b.copy_(aside, non_blocking=True)
        self._halfway = False


def _aligned(pair: Pair) -> bool:
    return not any(t.data_ptr() % _KERNEL_NBYTES for t in pair)


def _kernel(pairs: Sequence[Pair]) -> Launch | None:
    one_gpu = len({t.device for pair in pairs for t in pair}) == 1 and all(
        a.is_cuda for a, _ in pairs
    )
    if not one_gpu or find_spec("triton") is None:
        return None
    heads = [(a[: _head(a)], b[: _head(a)]) for a, b in pairs if _aligned((a, b)) and _head(a)]
    if not heads:
        return None
    from weightsync_server.receiver import exchange_triton

    # compile the kernel now, not while the engine stands still at the first commit
    tiny = torch.zeros(2, _KERNEL_NBYTES, dtype=torch.uint8, device=heads[0][0].device)
    exchange_triton.Launch([(tiny[0], tiny[1])]).run()
    return exchange_triton.Launch(heads)


def _head(t: torch.Tensor) -> int:
    return t.numel() // _KERNEL_NBYTES * _KERNEL_NBYTES


def _chunks(pairs: Sequence[Pair], device: torch.device, *, with_heads: bool) -> list[Pair]:
    """The pairs in parts that fit into the buffer; without what the kernel does, where it does."""
    limit = _CPU_CHUNK_NBYTES if device.type == "cpu" else _GPU_CHUNK_NBYTES
    return [
        (a[start : start + limit], b[start : start + limit])
        for a, b in pairs
        for start in range(0 if with_heads or not _aligned((a, b)) else _head(a), a.numel(), limit)
    ]
