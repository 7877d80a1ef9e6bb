"""Shadow memory: where a push lands while the engine goes on serving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from weightsync.errors import HeadroomError
from weightsync.slab import ALIGN_NBYTES, Slab
from weightsync_server.receiver.exchange import Exchange
from weightsync_server.receiver.kernel import Identity, flat_bytes

#: every shadow starts at a multiple of this, as GPUs copy fastest
_ALIGN_NBYTES = 256


class Shadow:
    """A second copy of kernel tensors that can be written directly.

    Pushes land in it (WS-1: any time), and a commit exchanges it with the live tensors, which
    leaves the version before in it.

    Args:
        live: The live tensors by name, each contiguous.
        device: Where the shadow lies; on a host with a GPU engine the memory is pinned.

    Raises:
        HeadroomError: There is no room for it.
    """

    def __init__(self, live: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.device = device
        self._live = {name: t.detach() for name, t in live.items()}
        self._identities = {name: Identity.of(t) for name, t in self._live.items()}
        at, offsets = 0, {}
        for name, t in self._live.items():
            offsets[name] = at
            at += _room(t)
        pinned = device.type == "cpu" and any(t.is_cuda for t in live.values())
        self.slab = Slab(at, device, pinned=pinned)
        self.memory = {
            name: self.slab.data[offsets[name] : offsets[name] + _nbytes(t)]
            .view(t.dtype)
            .view(t.shape)
            for name, t in self._live.items()
        }
        self.exchange = Exchange(
            [(flat_bytes(t), flat_bytes(self.memory[name])) for name, t in self._live.items()]
        )

    def is_of(self, live: Mapping[str, torch.Tensor], device: torch.device) -> bool:
        """Whether it is what would be made for these tensors, which have not moved."""
        now = {name: Identity.of(t) for name, t in live.items()}
        return now == self._identities and device == self.device

    @torch.no_grad()
    def take_over(self, name: str, intervals: tuple[tuple[int, int], ...]) -> None:
        """Copy byte intervals from the live tensor: what no push writes must be there, too."""
        live, shadow = flat_bytes(self._live[name]), flat_bytes(self.memory[name])
        for start, stop in intervals:
            shadow[start:stop].copy_(live[start:stop])

    def close(self) -> None:
        """Free the memory.  Safe to call twice."""
        self.memory = {}
        self.exchange = Exchange([])
        self.slab.close()


def fitting(live: Mapping[str, torch.Tensor], limit_nbytes: int | None) -> dict[str, torch.Tensor]:
    """Those of the live tensors whose shadows take at most ``limit_nbytes`` together.

    The largest come first: fewest writes are left for the pause.
    """
    if limit_nbytes is None:
        return dict(live)
    left, chosen = limit_nbytes, set()
    for name in sorted(live, key=lambda n: (-_nbytes(live[n]), n)):
        if _room(live[name]) <= left:
            left -= _room(live[name])
            chosen.add(name)
    return {name: t for name, t in live.items() if name in chosen}


def shadow_nbytes(live: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the shadow of these tensors takes."""
    return sum(map(_room, live.values())) + ALIGN_NBYTES


def check_headroom(device: torch.device, nbytes: int, what: str) -> None:
    """Whether ``nbytes`` more fit into the memory of ``device``.

    Raises:
        HeadroomError: They do not.
    """
    free = free_nbytes(device)
    if free is not None and nbytes > free:
        raise HeadroomError(
            f"{what} needs {nbytes} bytes on {device}, and {free} are free",
            hint="give the engine less (vLLM: --gpu-memory-utilization), start the agent with "
            "--shadow-device cpu or with a --max-shadow-nbytes that fits, or push in mode direct",
            needed_nbytes=nbytes,
            free_nbytes=free,
        )


def free_nbytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device now; None: nobody knows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch only keeps for later is free
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _room(t: torch.Tensor) -> int:
    return -(-_nbytes(t) // _ALIGN_NBYTES) * _ALIGN_NBYTES


def _nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()
