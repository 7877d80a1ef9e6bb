"""The inference side of a push, inside one worker: attach, layout, connect, begin, commit, abort.

The agent drives it (through the engine's fan-out), one call at a time, on the worker's own
thread.  It trusts nobody: identity is checked before bytes may land, digests before they count,
and a worker whose live weights may be half written says so (``dirty``) until a whole push.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable

import torch

from weightsync.checkpoint import Checkpoint
from weightsync.errors import (
    EngineError,
    InputError,
    LayoutError,
    NoSessionError,
    PushInProgressError,
    StaleEpochError,
    StaleVersionError,
)
from weightsync.manifest import Manifest
from weightsync.transport.base import LocalMemory, Transport
from weightsync.worker_messages import (
    AbortBody,
    AbortReply,
    AttachBody,
    AttachReply,
    BeginBody,
    ChecksumsReply,
    CommitBody,
    CommitReply,
    ConnectBody,
    DescribeReply,
    LayoutBody,
    LayoutReply,
    VerifyBody,
    VerifyReply,
)
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.epoch import Epoch
from weightsync_server.receiver.install import Given, materialise, transplant
from weightsync_server.receiver.kernel import Identity, check_identities, same_bytes, tensor_at
from weightsync_server.receiver.oracle import checksums
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.target import Copies, Target, copies_by_tensor
from weightsync_server.receiver.tracer import trace
from weightsync_server.receiver.units import Proofs
from weightsync_server.receiver.verify import differences

logger = logging.getLogger(__name__)


class Receiver:
    """Receives pushes for one worker.

    Args:
        adapter: The engine's ways.
        new_transport: Makes a transport with a name that was never used.
    """

    def __init__(self, adapter: EngineAdapter, new_transport: Callable[[], Transport]) -> None:
        self.adapter = adapter
        self.instance = uuid.uuid4().hex
        self.version = 0
        self.dirty = False
        self._new_transport = new_transport
        self._prover = Prover(adapter)
        self._reference: Copies | None = None
        self._proofs: Proofs | None = None
        self._identities: dict[str, Identity] = {}
        self._epoch: Epoch | None = None
        self._committed: tuple[str, CommitReply] | None = None

    # ------------------------------------------------------------------ attach

    def describe(self) -> DescribeReply:
        """What this worker is and holds."""
        return DescribeReply(
            place=str(self.adapter.place),
            instance=self.instance,
            engine=self.adapter.name,
            engine_version=self.adapter.version,
            version=self.version,
            dirty=self.dirty,
            epoch=0 if self._epoch is None else self._epoch.number,
            pid=os.getpid(),
            checkpoint=self.adapter.checkpoint() is not None,
        )

    def attach(self, body: AttachBody) -> AttachReply:
        """Prove how bytes may reach the kernel tensors; ``full`` compares all bytes, and anew.

        Weights that came from a push cannot be compared with the checkpoint any more; proofs that
        hold by identity are kept, and else the next push proves (see ``_first_install``).
        """
        start = time.perf_counter()
        self._drop_moved()
        self._prove_by_checkpoint(full=body.proof == "full")
        warnings: list[str] = []
        if self._proofs is None:
            warnings.append(
                "the live weights are on no disk to compare with: the next push is installed "
                "through the engine's own loader, and proves the ones after it"
            )
        proofs = self._proofs or Proofs()
        names = {n for u in proofs.units for n in u.params.values()}
        return AttachReply(
            kernel_tensors=len(names),
            direct=sum(proofs.mode(n) == "direct" for n in names),
            staged=sum(proofs.mode(n) == "staged" for n in names),
            refusals=sorted(proofs.refusals.items()),
            warnings=warnings,
            seconds={"attach": time.perf_counter() - start},
        )

    def _prove_by_checkpoint(self, *, full: bool) -> None:
        """Prove against the checkpoint on disk, where that still is what the engine serves."""
        folder = self.adapter.checkpoint()
        if folder is None or self.version or self.dirty or (self._proofs is not None and not full):
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
        self._reference = copies_by_tensor(
            trace(self.adapter.new_twin(), self.adapter.load, manifest)
        )
        self._accept(self._prover.prove(self._reference, checkpoint.flat, full=full))

    def _accept(self, proofs: Proofs) -> None:
        """Keep proofs, and by what they hold: direct tensors stay where they are."""
        self._proofs = proofs
        self._identities = {}
        for unit in proofs.units:
            module = f"{unit.path}." if unit.path else ""
            for leaf, name in unit.params.items():
                t = tensor_at(self.adapter.live, module + leaf)
                if proofs.mode(name) == "direct" and t is not None:
                    self._identities[module + leaf] = Identity.of(t)

    def _check_place(self) -> None:
        """Check identities; what moved ends the epoch and its proofs.

        Raises:
            IdentityError: A kernel tensor moved.
        """
        try:
            check_identities(self.adapter.live, self._identities)
        except LayoutError:
            self._proofs, self._identities = None, {}
            self.close()
            raise

    def _drop_moved(self) -> None:
        try:
            self._check_place()
        except LayoutError as error:
            logger.warning("%s", error)

    # ------------------------------------------------------------------ rendezvous

    def layout(self, body: LayoutBody) -> LayoutReply:
        """Trace the trainer's manifest, register the memory, open an epoch.

        Raises:
            ManifestError: Names, shapes, dtypes.
            TraceError: The loader cannot be expressed.
            RefusedError: A tensor could not be proven.
        """
        self.close()
        self._drop_moved()
        self._prove_by_checkpoint(full=False)
        manifest = Manifest(body.manifest)
        traced = trace(self.adapter.new_twin(), self.adapter.load, manifest)
        proofs = self._proofs
        target = Target(
            self.adapter.place,
            self._prover,
            traced,
            self._unproven(copies_by_tensor(traced)) if proofs is None else proofs,
            manifest,
            self._reference,
        )
        transport = self._new_transport()
        try:
            transport.register(
                [
                    LocalMemory(r.addr, r.nbytes, r.kind, r.device_id)
                    for r in target.layout.regions
                    if r.nbytes
                ]
            )
            metadata = transport.metadata()
        except BaseException:
            transport.close()
            raise
        self._epoch = Epoch(body.epoch, manifest, target, proofs, transport)
        return LayoutReply(type(transport).__name__, metadata, target.layout)

    def connect(self, body: ConnectBody) -> None:
        """Take in the writing ranks and prove that together they write every byte once (WS-7)."""
        self._current(body.epoch).connect(body.ranks)

    def _current(self, number: int) -> Epoch:
        if self._epoch is None:
            raise NoSessionError(
                f"worker {self.adapter.place} has no rendezvous",
                hint="call /init_transfer and /connect first",
            )
        if self._epoch.number != number:
            raise StaleEpochError(
                f"epoch {number} is over at {self.adapter.place}: it is {self._epoch.number} now",
                hint="make a new rendezvous",
            )
        return self._epoch

    # ------------------------------------------------------------------ one push

    def begin(self, body: BeginBody) -> None:
        """The engine is paused: check identities, then expect bytes for ``body.version``.

        Raises:
            IdentityError: A kernel tensor moved.
            StaleVersionError: The version does not grow.
            StaleEpochError: The epoch is over, or the version was begun in it before.
        """
        epoch = self._current(body.epoch)
        if body.version < self.version or (body.version == self.version and not self.dirty):
            raise StaleVersionError(
                f"version {body.version} is not newer than {self.version} at {self.adapter.place}",
                hint="versions only grow",
            )
        self.adapter.synchronize()
        self._check_place()
        if epoch.begin(body):
            # from here on a write may land in live memory at any time (WS-4)
            self.dirty = self.dirty or len(epoch.target.staged) < len(epoch.target.memory)

    def commit(self, body: CommitBody) -> CommitReply:
        """Wait for every writer, compare digests, install, refresh; then the version is real.

        A repeat of the last commit gets the same answer.

        Raises:
            DeadlineError: A writer did not report this version in time.
            VerifyError: A digest differs.
            IdentityError: A kernel tensor moved since the push began.
        """
        if (
            self._committed is not None
            and self._committed[0] == body.push_id
            and self._committed[1].version == body.version
            and not self.dirty
        ):
            return self._committed[1]
        epoch = self._current(body.epoch)
        if epoch.pushing != BeginBody(body.epoch, body.version, body.push_id):
            raise NoSessionError(
                f"push {body.push_id} of version {body.version} was never begun at "
                f"{self.adapter.place}",
                hint="call /begin_update first",
            )
        marks = [time.perf_counter()]
        epoch.wait_for_writers(body)
        marks.append(time.perf_counter())
        epoch.check_digests(body)
        marks.append(time.perf_counter())
        # the digests are of the registered memory: is it still what the engine serves with?
        self._check_place()
        if epoch.proofs is None:
            self._first_install(epoch)
        else:
            self._install(epoch.target, epoch.proofs)
        marks.append(time.perf_counter())
        self.adapter.refresh()
        self.adapter.synchronize()
        self.version, self.dirty, epoch.pushing = body.version, False, None
        marks.append(time.perf_counter())
        first = epoch.proofs is None
        if first:
            self.close()  # the layout is another one now: the next push makes a new rendezvous
        parts = ("writers", "digest", "install", "refresh")
        seconds = {p: b - a for p, a, b in zip(parts, marks, marks[1:], strict=False)}
        self._committed = body.push_id, CommitReply(body.version, seconds, epoch_over=first)
        return self._committed[1]

    def _install(self, target: Target, proofs: Proofs) -> None:
        self.dirty = True
        for unit in proofs.units:
            if unit.kind != "direct":
                # renewed: finishing leaves the live memory alone, and may go on referring to it
                given: Given = "share" if unit.kind == "renewed" else "copy"
                made, live = self._prover.finished(unit, target.memory, given)
                transplant(live, made, replaceable=self.adapter.replaceable)

    def _first_install(self, epoch: Epoch) -> None:
        """Nothing was proven: install through the engine's own loader, and prove by the result."""
        target = epoch.target
        rebuilt = target.rebuild(epoch.manifest)
        twin = self.adapter.new_twin()
        materialise(twin, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=self.adapter.device))
        self.adapter.load(
            twin, [(t.name, rebuilt[t.name].reshape(t.shape)) for t in epoch.manifest]
        )
        for name, staged in target.memory.items():
            loaded = tensor_at(twin, name)
            if loaded is None or not same_bytes(loaded, staged):
                raise LayoutError(
                    f"the engine's loader makes another {name} than its trace predicted",
                    hint="this model cannot be pushed; the engine keeps its weights",
                    tensor=name,
                )
        del twin
        self._install(target, self._unproven(target.copies))
        self._reference = target.copies
        self._accept(self._prover.prove(target.copies, rebuilt.__getitem__, full=False))

    def _unproven(self, copies: Copies) -> Proofs:
        proofs = self._prover.guess(copies)
        for unit in proofs.units:
            unit.kind = "staged"
        return proofs

    def abort(self, body: AbortBody) -> AbortReply:
        """Give a push up.  ``dirty`` stays until a whole push: writes may have landed."""
        if self._epoch is not None and (push := self._epoch.pushing) is not None:
            logger.warning("push %s of version %d is aborted", push.push_id, push.version)
            # a late write of this epoch must find nothing that a later push trusts (WS-8)
            self.close()
        return AbortReply(self.dirty, self.version)

    def close(self) -> None:
        """End the epoch: drop peers, registrations, staging."""
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            epoch.close()

    # ------------------------------------------------------------------ inspection

    def checksums(self) -> ChecksumsReply:
        """SHA-256 of every final kernel tensor; of opaque weights, of what they compute.

        Raises:
            LayoutError: A weight is in no tensor and cannot be read back.
        """
        # without proofs the prover looks at every module that could own a weight
        proofs = self._proofs or self._prover.guess(dict.fromkeys(self._prover.tensors(), ()))
        return ChecksumsReply(checksums(self._prover, proofs.units))

    def verify(self, body: VerifyBody) -> VerifyReply:
        """Compare what the engine serves with what this epoch's ranks would write.

        Raises:
            PushInProgressError: A push of this epoch is writing.
            IdentityError: A kernel tensor moved.
            VerifyError: What was written to staging memory is not what was sent.
        """
        epoch = self._current(body.epoch)
        if epoch.pushing is not None:
            raise PushInProgressError(
                f"push {epoch.pushing.push_id} is writing", hint="ask again when it is over"
            )
        self._check_place()
        self.adapter.synchronize()
        proofs = epoch.proofs or self._unproven(epoch.target.copies)
        found = differences(epoch, proofs, self._prover, body.ranks)
        return VerifyReply(len(epoch.target.memory), sorted(found.items()))
