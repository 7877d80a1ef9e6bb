"""The version before the one that is served: its bytes, and how they are put back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch

from weightsync.errors import NoPreviousError
from weightsync.worker_messages import Headroom, LayoutBody
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.installer import renew
from weightsync_server.receiver.kept import Kept, kept_nbytes
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.shadow import (
    Shadow,
    check_headroom,
    fitting,
    free_nbytes,
    shadow_nbytes,
)
from weightsync_server.receiver.units import Proofs, Unit


class History:
    """One step back, for pushes that go through a shadow.

    A shadow outlives its epoch: the version before lies in it until the next push begins.

    Args:
        adapter: The engine.
        prover: Of its live model.

    Attributes:
        rollback_to: The version whose bytes are kept, all of them; None: there is none.
    """

    def __init__(self, adapter: EngineAdapter, prover: Prover) -> None:
        self._adapter = adapter
        self._prover = prover
        self._shadow: Shadow | None = None
        self._kept = Kept()
        self._copied = False
        self._renewed: list[Unit] = []
        self.rollback_to: int | None = None

    def device(self, body: LayoutBody) -> torch.device | None:
        """Where buffers lie in this layout; None: where the live tensors do."""
        aside = body.mode == "shadow" and body.shadow_device == "cpu"
        return torch.device("cpu") if aside else None

    def shadow_of(
        self, body: LayoutBody, proofs: Proofs
    ) -> Callable[[dict[str, torch.Tensor]], Shadow] | None:
        """What makes the shadow of an epoch; None where it is to have none."""
        if body.mode != "shadow":
            return None

        def make(live: dict[str, torch.Tensor]) -> Shadow:
            device = self.device(body) or self._adapter.device
            chosen = fitting(live, body.max_shadow_nbytes)
            if self._shadow is None or not self._shadow.is_of(chosen, device):
                self.drop()
                self._check_headroom(chosen, device, _staged(proofs))
                self._shadow = Shadow(chosen, device)
            return self._shadow

        return make

    def _check_headroom(
        self, chosen: Mapping[str, torch.Tensor], device: torch.device, staged: list[Unit]
    ) -> None:
        shadow = shadow_nbytes(chosen)
        kept = kept_nbytes(self._prover, staged)
        if device == self._adapter.device:
            check_headroom(device, shadow + kept, "the shadow of the weights")
        else:
            check_headroom(device, shadow, "the shadow of the weights")
            check_headroom(self._adapter.device, kept, "what a rollback of the weights puts back")

    def headroom(
        self, shadow_device: str, proofs: Proofs | None, buffers: Iterable[torch.Tensor]
    ) -> list[Headroom]:
        """What a shadow of all weights takes of each kind of memory, and what there is.

        Where nothing is proven yet, all weights count as if they could be written directly.

        Args:
            shadow_device: See :class:`LayoutBody`.
            proofs: How bytes may reach the kernel tensors; None: nothing is proven.
            buffers: Of staged tensors, those that there are.
        """
        home = self._adapter.device
        aside = torch.device("cpu") if shadow_device == "cpu" else home
        if proofs is None:
            direct, staged = [n for n, _ in self._prover.twin.named_parameters()], []
        else:
            modes = {n: proofs.mode(n) for u in proofs.units for n in u.params.values()}
            direct = [n for n, mode in modes.items() if mode == "direct"]
            staged = [n for n, mode in modes.items() if mode == "staged"]
        like = self._prover.load_format
        needed, held = Counter[str](), Counter[str]()
        needed[aside.type] += shadow_nbytes({n: like(n) for n in direct})
        needed[aside.type] += sum(like(n).nbytes for n in staged)
        if proofs is not None:
            needed[home.type] += kept_nbytes(self._prover, _staged(proofs))
        if self._shadow is not None:
            held[self._shadow.device.type] += self._shadow.slab.nbytes
        held[home.type] += self._kept.nbytes
        for buffer in buffers:
            held[buffer.device.type] += buffer.nbytes
        return [
            Headroom(
                "VRAM" if device.type == "cuda" else "DRAM",
                needed[device.type],
                held[device.type],
                free_nbytes(device),
            )
            for device in dict.fromkeys((home, aside))
            if needed[device.type]
        ]

    def forget(self, *, shadowed: bool) -> None:
        """A push begins: what was kept is about to be written over, or to be of no use.

        Args:
            shadowed: The push has a shadow; else the memory goes.
        """
        self.rollback_to = None
        self._copied = False
        if not shadowed:
            self.drop()
        elif self._shadow is not None:
            self._shadow.exchange.reset()

    def drop(self) -> None:
        """Free what is kept."""
        self.rollback_to = None
        self._copied = False
        self._kept.clear()
        shadow, self._shadow = self._shadow, None
        if shadow is not None:
            shadow.close()

    def copy(self, proofs: Proofs) -> None:
        """Copy what a commit writes in place from staging memory; the engine may serve."""
        if not self._copied:
            self._kept.copy(self._prover, _staged(proofs))
            self._copied = True

    def exchange(self, version: int, proofs: Proofs, *, whole: bool) -> None:
        """Put the shadow in the place of the live tensors.

        The engine is paused, drained and synchronised (WS-1), and the shadow is checked (WS-4).

        Args:
            version: That the engine has until now.
            proofs: What the commit will install.
            whole: Nothing was written but to shadow and staging memory: ``version`` is kept.
        """
        if self._shadow is None:
            return
        self.copy(proofs)
        self._kept.note()
        self._renewed = [u for u in proofs.units if u.kind == "renewed"]
        # from here on a failure leaves the engine torn, and this version is the way out
        self.rollback_to = version if whole else None
        self._shadow.exchange.run()

    def settle(self) -> None:
        """The commit succeeded."""
        self._kept.settle()

    def put_back(self, to: int) -> None:
        """Undo the last commit, or what of it was done.  The engine is paused and synchronised.

        After an error nothing is known of the live tensors any more.

        Raises:
            NoPreviousError: The bytes of version ``to`` are not here; nothing was changed.
        """
        if self._shadow is None or self.rollback_to != to:
            kept = "none" if self.rollback_to is None else f"version {self.rollback_to}"
            raise NoPreviousError(
                f"version {to} is not kept at {self._adapter.place}: {kept} is",
                hint="only the version before the last push in shadow mode is; push instead",
            )
        self.rollback_to = None
        self._shadow.exchange.undo()
        self._kept.put_back()
        for unit in self._renewed:
            renew(self._prover, unit)


def _staged(proofs: Proofs) -> list[Unit]:
    return [unit for unit in proofs.units if unit.kind == "staged"]
