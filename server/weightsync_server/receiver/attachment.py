"""What is known of the live model: how bytes may reach its tensors, and where those are."""

from __future__ import annotations

import time

from weightsync.checkpoint import Checkpoint
from weightsync.errors import EngineError, InputError, LayoutError
from weightsync.worker_messages import AttachReply
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.kernel import Identity, Places, tensor_at
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.target import Copies, copies_by_tensor
from weightsync_server.receiver.tracer import trace
from weightsync_server.receiver.units import Proofs


class Attachment:
    """Proofs, and what they hold by.

    Args:
        adapter: The engine's ways.
        prover: Of its live model.

    Attributes:
        proofs: How bytes may reach the kernel tensors; None: nothing is proven.
        reference: The load that they were made by, or those before them; None: there was none.
    """

    def __init__(self, adapter: EngineAdapter, prover: Prover) -> None:
        self.proofs: Proofs | None = None
        self.reference: Copies | None = None
        self._adapter = adapter
        self._prover = prover
        self._places = Places(adapter.live, {})

    def attach(self, *, full: bool, pushed: bool) -> AttachReply:
        """Prove how bytes may reach the kernel tensors; ``full`` compares all bytes, and anew.

        Weights that were ``pushed`` cannot be compared with the checkpoint any more; proofs that
        hold by identity are kept, and else the next push proves.
        """
        start = time.perf_counter()
        self.prove_by_checkpoint(full=full, pushed=pushed)
        warnings: list[str] = []
        if self.proofs is None:
            warnings.append(
                "the live weights are on no disk to compare with: the next push is installed "
                "through the engine's own loader, and proves the ones after it"
            )
        proofs = self.proofs or Proofs()
        names = {n for u in proofs.units for n in u.params.values()}
        return AttachReply(
            kernel_tensors=len(names),
            direct=sum(proofs.mode(n) == "direct" for n in names),
            staged=sum(proofs.mode(n) == "staged" for n in names),
            refusals=sorted(proofs.refusals.items()),
            warnings=warnings,
            seconds={"attach": time.perf_counter() - start},
        )

    def prove_by_checkpoint(self, *, full: bool, pushed: bool) -> None:
        """Prove against the checkpoint on disk, where that still is what the engine serves."""
        folder = self._adapter.checkpoint()
        if folder is None or pushed or (self.proofs is not None and not full):
            return
        try:
            checkpoint = Checkpoint(folder)
            manifest = checkpoint.manifest()
        except InputError as error:
            raise EngineError(
                error.message,
                hint="the engine's weights are proven against it: mend it, or start the engine "
                "from another",
            ) from error
        copies = copies_by_tensor(trace(self._adapter.new_twin(), self._adapter.load, manifest))
        self.accept(copies, self._prover.prove(copies, checkpoint.flat, full=full))

    def accept(self, reference: Copies, proofs: Proofs) -> None:
        """Keep proofs, made by the load ``reference``, while direct tensors stay where they are."""
        self.reference, self.proofs = reference, proofs
        identities = {}
        for unit in proofs.units:
            module = f"{unit.path}." if unit.path else ""
            for leaf, name in unit.params.items():
                t = tensor_at(self._adapter.live, module + leaf)
                if proofs.mode(name) == "direct" and t is not None:
                    identities[module + leaf] = Identity.of(t)
        self._places = Places(self._adapter.live, identities)

    def check_place(self) -> None:
        """Check that direct tensors are where they were; what moved ends the proofs.

        Raises:
            IdentityError: A kernel tensor moved.
        """
        try:
            self._places.check()
        except LayoutError:
            self.proofs, self._places = None, Places(self._adapter.live, {})
            raise
