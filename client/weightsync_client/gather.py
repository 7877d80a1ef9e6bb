"""Small tensors that are cut over the ranks: one rank gets each whole, and writes it once.

What ranks give each other in one push is one message from each to each.  It goes through host
memory, over connections of our own, as all meetings do: no collective of the trainer's is touched,
none can hang it, and the bytes are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from weightsync.errors import InputError
from weightsync.geometry import Box
from weightsync.manifest import Manifest, TensorSpec
from weightsync.ownership import Share
from weightsync_client.ranks import Ranks
from weightsync_client.slots import torch_dtype
from weightsync_client.source import WeightSource

#: a part of a message begins at a multiple of this many bytes, which every item size divides
_ALIGN_NBYTES = 16


class Gather:
    """What one rank gives and takes in every push of an epoch.

    Args:
        shares: Of this rank, in the plan's order.
        rank: This rank.
        manifest: Tells shapes, and the dtype that a value is rounded to before it travels, as it
            would be afterwards (WS-12).
        device: Where this rank's slots are.
    """

    def __init__(
        self, shares: Sequence[Share], *, rank: int, manifest: Manifest, device: torch.device
    ) -> None:
        self._rank = rank
        self._manifest = manifest
        self._device = device
        self._given: dict[int, list[Share]] = {}
        self._taken: dict[int, list[Share]] = {}
        for share in shares:
            if share.giver == rank:
                self._given.setdefault(share.taker, []).append(share)
            if share.taker == rank:
                self._taken.setdefault(share.giver, []).append(share)
        taken = dict.fromkeys(s.tensor for s in shares if s.taker == rank)
        specs = [manifest.by_name[name] for name in taken]
        self._wholes = [Share(s.name, Box.whole(s.shape), rank, 0, rank, s.nbytes) for s in specs]
        self.nbytes = sum(s.nbytes for s in shares)
        self._messages: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def pack(self, source: WeightSource) -> None:
        """Lay out what this rank gives, before any rank depends on it (WS-5).

        Raises:
            InputError: A tensor has not the shape that the source declared.
        """
        holdings = source.holdings()
        shares = [share for given in self._given.values() for share in given]
        packed = torch.empty(_length(shares), dtype=torch.uint8, device=self._device)
        for share, part in self._parts(shares, packed):
            box = holdings[share.tensor][share.box]
            local = source.local(share.tensor, share.box)
            if tuple(local.shape) != box.shape:
                raise InputError(
                    f"{share.tensor!r} has shape {tuple(local.shape)}, declared was {box.shape}",
                    hint="weights must not change shape in a push",
                    tensor=share.tensor,
                )
            index = tuple(
                slice(a - base, b - base)
                for a, b, base in zip(share.window.lo, share.window.hi, box.lo, strict=True)
            )
            part.copy_(local.detach()[index])
        host = packed.cpu()  # one copy, and one wait for the device
        at = 0
        for taker, given in self._given.items():
            self._messages[taker] = host[at : at + _length(given)]
            at += _length(given)

    @torch.no_grad()
    def exchange(self, ranks: Ranks, source: WeightSource, *, timeout_s: float) -> WeightSource:
        """Give and take; all ranks call it, after each has packed.

        Returns:
            The source, with what was taken; good for this push.

        Raises:
            RankFailedError: A rank is gone or late.
        """
        messages, self._messages = self._messages, {}
        taken = {
            giver: torch.empty(_length(shares), dtype=torch.uint8)
            for giver, shares in self._taken.items()
            if giver != self._rank
        }
        if self._rank in self._taken:
            taken[self._rank] = messages.pop(self._rank)
        others = {giver: message for giver, message in taken.items() if giver != self._rank}
        ranks.exchange(messages, others, timeout_s=timeout_s)
        host = torch.empty(_length(self._wholes), dtype=torch.uint8)
        whole = {share.tensor: values for share, values in self._parts(self._wholes, host)}
        for giver, message in taken.items():
            for share, values in self._parts(self._taken[giver], message):
                window = share.window
                index = tuple(slice(a, b) for a, b in zip(window.lo, window.hi, strict=True))
                whole[share.tensor][index] = values
        here = host.to(self._device)
        return _Gathered(
            source, {s.tensor: values for s, values in self._parts(self._wholes, here)}
        )

    def _parts(
        self, shares: Iterable[Share], message: torch.Tensor
    ) -> Iterable[tuple[Share, torch.Tensor]]:
        """Each share and its place in a message, typed and in its shape."""
        at = 0
        for share in shares:
            dtype = torch_dtype(self._manifest.by_name[share.tensor].dtype)
            yield share, message[at : at + share.nbytes].view(dtype).view(share.window.shape)
            at += _aligned(share.nbytes)


class _Gathered:
    """A source, and whole tensors: each is one more box behind those that the source holds."""

    def __init__(self, source: WeightSource, values: Mapping[str, torch.Tensor]) -> None:
        self._source = source
        self._values = values
        self._held = dict(source.holdings())
        for name, tensor in values.items():
            self._held[name] = (*self._held.get(name, ()), Box.whole(tensor.shape))

    def manifest(self) -> Iterable[TensorSpec]:
        return self._source.manifest()

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        return self._held

    def local(self, name: str, box_index: int) -> torch.Tensor:
        if name in self._values and box_index == len(self._held[name]) - 1:
            return self._values[name]
        return self._source.local(name, box_index)


def _length(shares: Iterable[Share]) -> int:
    return sum(_aligned(share.nbytes) for share in shares)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_NBYTES) * _ALIGN_NBYTES
