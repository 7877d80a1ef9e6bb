"""What an end of the ``cuda_ipc`` transport hands out beside its carrier's metadata."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync import codec
from weightsync.errors import InputError, TransportError
from weightsync.transport.base import LocalMemory, Side, WriteOp
from weightsync.transport.cuda_driver import Allocation
from weightsync.transport.registry import RegisteredMemory

_MAGIC = b"weightsync-cuda-ipc-2:"


@dataclass(frozen=True, slots=True)
class Offer:
    """How another process of the host may write here.

    Attributes:
        carrier: The carrier's metadata, which tells of host memory alone, the pad's, too.
        whole: The same, of all memory: for whoever cannot map a GPU's.
        near: The neighbourhood in which it can be mapped.
        process: Whose it is.
        allocations: What can be mapped, in the order of their addresses.
        memory: What may be written to: parts of them, or none.
        pad: Where the pad is, in host memory.
    """

    carrier: bytes
    whole: bytes
    near: str
    process: str
    allocations: tuple[Allocation, ...]
    memory: tuple[LocalMemory, ...]
    pad: int

    def packed(self) -> bytes:
        """As metadata."""
        return _MAGIC + codec.pack(self).encode()

    @staticmethod
    def of(metadata: bytes) -> Offer | None:
        """The offer in some metadata; None: the metadata is the carrier's own.

        Raises:
            TransportError: It is damaged.
        """
        if not metadata.startswith(_MAGIC):
            return None
        try:
            return codec.unpack(metadata[len(_MAGIC) :].decode("ascii", "replace"), Offer)
        except InputError as error:
            raise TransportError(
                f"{len(metadata)} bytes are no metadata of weightsync, or are damaged",
                hint="hand over what the peer's metadata() returned, unchanged",
            ) from error

    def check(self, peer: str, side: Side, ops: Sequence[WriteOp]) -> None:
        """Refuse writes to other memory than was offered.

        Raises:
            TransportError: One is.
        """
        registered = RegisteredMemory()
        registered.add(self.memory)
        parts = ((op.remote_addr, op.nbytes) for op in ops)
        registered.check("remote", side, peer, parts)

    def allocation(self, op: WriteOp) -> Allocation:
        """Where a write goes to.

        Raises:
            TransportError: To nothing that can be mapped.
        """
        k = bisect_right(self.allocations, op.remote_addr, key=lambda each: each.base) - 1
        if k >= 0:
            found = self.allocations[k]
            if op.remote_addr + op.nbytes <= found.base + found.nbytes:
                return found
        raise TransportError(f"{op.remote_addr:#x} is in no memory that can be mapped")
