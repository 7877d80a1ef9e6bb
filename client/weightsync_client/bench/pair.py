"""One of two processes that move the same bytes by other means.

``python -m weightsync_client.bench.pair DEVICE source|target``
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from weightsync.lines import serve
from weightsync_client.bench.raw import RawNixl

_JOIN_S = 60.0
_COPY_NBYTES = 4 << 30


class Pair:
    """Answers commands; :class:`weightsync_client.bench.baselines.Baselines` gives them.

    Args:
        device: Where the bytes lie, as torch names it.
        target: Whether this process receives.
    """

    def __init__(self, device: str, *, target: bool) -> None:
        self._device = torch.device(device)
        self._target = target
        self._raw: dict[int, RawNixl] = {}
        self._tensors: list[torch.Tensor] = []
        self._copies: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def open_raw(self, nbytes: int, threads: int) -> dict[str, Any]:
        """Make this end of a raw NIXL connection that so many threads write over."""
        raw = RawNixl(nbytes, self._device, target=self._target, threads=threads)
        self._raw[threads] = raw
        return raw.describe()

    def connect_raw(self, metadata: str, addr: int, threads: int) -> dict[str, Any]:
        """Take in the target's end."""
        self._opened(threads).connect(metadata, addr)
        return {}

    def write_raw(
        self,
        nbytes: int,
        piece_nbytes: int,
        repeats: int = 1,
        *,
        threads: int = 1,
        sleeping: bool = False,
    ) -> dict[str, float]:
        """Median seconds of writing that many bytes in pieces."""
        seconds = self._opened(threads).write(nbytes, piece_nbytes, repeats, sleeping=sleeping)
        return {"seconds": statistics.median(seconds)}

    def join(self, backend: str, port: int, shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Meet the other process in a process group, and make the tensors to broadcast."""
        dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=int(self._target),
            world_size=2,
            timeout=timedelta(seconds=_JOIN_S),
            device_id=self._device if self._device.type == "cuda" else None,
        )
        self._tensors = [
            torch.ones(tuple(shape), dtype=torch.bfloat16, device=self._device) for shape in shapes
        ]
        return {}

    def broadcast(self) -> dict[str, float]:
        """Seconds of one broadcast a tensor, from the moment at which both ends are there."""
        self._meet()
        started = time.perf_counter()
        for tensor in self._tensors:
            dist.broadcast(tensor, src=0)
        self._synchronize()
        return {"seconds": time.perf_counter() - started}

    def copy_device(self, nbytes: int) -> dict[str, float]:
        """Seconds of plain copies from this GPU to the next; within it, where it is alone.

        They go through a part of that memory again and again: the engines have most of it.
        """
        if self._copies is None:
            other = torch.device("cuda", min(1, torch.cuda.device_count() - 1))
            source, target = (
                torch.ones(_COPY_NBYTES, dtype=torch.uint8, device=device)
                for device in (self._device, other)
            )
            self._copies = source, target
        source, target = self._copies
        self._synchronize(target.device)
        started = time.perf_counter()
        for at in range(0, nbytes, _COPY_NBYTES):
            length = min(nbytes - at, _COPY_NBYTES)
            target[:length].copy_(source[:length])
        self._synchronize(target.device)
        return {"seconds": time.perf_counter() - started}

    def _opened(self, threads: int) -> RawNixl:
        if threads not in self._raw:
            raise RuntimeError("open_raw comes first")
        return self._raw[threads]

    def _meet(self) -> None:
        dist.barrier(device_ids=[self._device.index or 0] if self._device.type == "cuda" else None)
        self._synchronize()

    def _synchronize(self, *others: torch.device) -> None:
        if self._device.type == "cuda":
            for device in {self._device, *others}:
                torch.cuda.synchronize(device)


def main(argv: Sequence[str]) -> int:
    """Command line of the process; returns its exit status."""
    device, role = argv
    pair = Pair(device, target=role == "target")
    return serve(
        {
            "open_raw": pair.open_raw,
            "connect_raw": pair.connect_raw,
            "write_raw": pair.write_raw,
            "join": pair.join,
            "broadcast": pair.broadcast,
            "copy_device": pair.copy_device,
        }
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
