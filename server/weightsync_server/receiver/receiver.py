"""The inference side of a push, inside one worker: attach, layout, connect, begin, commit, abort.

The agent drives it (through the engine's fan-out), one call at a time, on the worker's own
thread.  It trusts nobody: identity is checked before bytes may land, digests before they count,
and a worker whose live weights may be half written says so (``dirty``) until a whole push.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import replace

from weightsync.errors import (
    LayoutError,
    NoPreviousError,
    NoSessionError,
    PushInProgressError,
    StaleVersionError,
)
from weightsync.manifest import Manifest
from weightsync.transport.base import Transport
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
    PrepareBody,
    PrepareReply,
    ReloadReply,
    RollbackBody,
    RollbackReply,
    VerifyBody,
    VerifyReply,
)
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.attachment import Attachment
from weightsync_server.receiver.epoch import Epoch
from weightsync_server.receiver.fence import refuse_fenced
from weightsync_server.receiver.history import History
from weightsync_server.receiver.installer import install, load_apart, unproven
from weightsync_server.receiver.laps import Laps
from weightsync_server.receiver.oracle import checksums
from weightsync_server.receiver.proof import Prover
from weightsync_server.receiver.reload import reload
from weightsync_server.receiver.target import Target, copies_by_tensor
from weightsync_server.receiver.tracer import trace
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
        self._attachment = Attachment(adapter, self._prover)
        self._epoch: Epoch | None = None
        self._committed: dict[tuple[str, int], CommitReply] = {}
        self._history = History(adapter, self._prover)
        self._rolled_back_from = 0
        self._newest_begun = 0

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
            rollback_to=self._history.rollback_to,
            rolled_back_from=self._rolled_back_from,
        )

    def attach(self, body: AttachBody) -> AttachReply:
        """Prove how bytes may reach the kernel tensors.  See :class:`Attachment`."""
        self._drop_moved()
        reply = self._attachment.attach(full=body.proof == "full", pushed=self._pushed)
        buffers = () if self._epoch is None else self._epoch.target.buffers()
        headroom = self._history.headroom(body.shadow_device, self._attachment.proofs, buffers)
        return replace(reply, headroom=headroom)

    @property
    def _pushed(self) -> bool:
        """Whether what is served is other than what the engine was started with."""
        return bool(self.version or self.dirty)

    def _check_place(self) -> None:
        """Check identities; what moved ends the epoch and its proofs.

        Raises:
            IdentityError: A kernel tensor moved.
        """
        try:
            self._attachment.check_place()
        except LayoutError:
            self._history.drop()
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
        self._attachment.prove_by_checkpoint(full=False, pushed=self._pushed)
        manifest = Manifest(body.manifest)
        traced = trace(self.adapter.new_twin(), self.adapter.load, manifest)
        proofs = self._attachment.proofs or unproven(self._prover, copies_by_tensor(traced))
        target = Target(
            self.adapter.place,
            self._prover,
            traced,
            proofs,
            manifest,
            self._attachment.reference,
            shadow_of=self._history.shadow_of(body, proofs),
            device=self._history.device(body),
        )
        shadowed = body.mode == "shadow"
        epoch = Epoch(body.epoch, manifest, target, proofs, self._new_transport, shadowed=shadowed)
        self._epoch = epoch
        kind = type(epoch.transport).__name__
        return LayoutReply(kind, epoch.metadata, target.layout, self._history.rollback_to)

    def connect(self, body: ConnectBody) -> None:
        """Take in the writing ranks and prove that together they write every byte once (WS-7).

        Raises:
            FencePendingError: A process of a push that is over might still write here.
            PlanError, TransportError: See :meth:`Epoch.connect`.
        """
        refuse_fenced(body.fenced, str(self.adapter.place))
        self._current(body.epoch).connect(body.ranks)

    def _current(self, number: int) -> Epoch:
        if self._epoch is None:
            raise NoSessionError(
                f"worker {self.adapter.place} has no rendezvous",
                hint="call /init_transfer and /connect first",
            )
        self._epoch.check_number(number)
        return self._epoch

    # ------------------------------------------------------------------ one push

    def begin(self, body: BeginBody) -> None:
        """Expect bytes for ``body.version``: in live memory too, if ``live`` (WS-1).

        Raises:
            IdentityError: A kernel tensor moved.
            StaleVersionError: The version does not grow.
            StaleEpochError: The epoch is over, or the version was begun in it before.
        """
        epoch = self._current(body.epoch)
        newest = max(self.version, self._rolled_back_from)
        if body.version < newest or (body.version == newest and not self.dirty):
            raise StaleVersionError(
                f"version {body.version} is not newer than {newest} at {self.adapter.place}",
                hint="versions only grow",
            )
        if body.live:
            self.adapter.synchronize()
        self._check_place()
        if not epoch.is_pushing(body):
            epoch.begin(body)
            self._newest_begun = max(self._newest_begun, body.version)
            self._history.forget(shadowed=epoch.shadowed)
        # from here on a write may land in live memory at any time (WS-4)
        self.dirty = self.dirty or (body.live and epoch.exposed)

    def prepare(self, body: PrepareBody) -> PrepareReply:
        """Check what was written beside the live tensors, so that the pause need not wait for it.

        The engine may serve.  A repeat checks nothing again.

        Raises:
            DeadlineError: A writer did not report this version in time.
            VerifyError: A digest differs.
        """
        epoch, laps = self._current(body.epoch), Laps()
        epoch.check_pushing(body)
        if not epoch.prepared:
            epoch.check_landed(body, laps)
            if epoch.shadowed and epoch.proofs.proven:
                self._history.copy(epoch.proofs)
            epoch.prepared = True
            laps.end("keep")
        return PrepareReply(laps.seconds)

    def commit(self, body: CommitBody) -> CommitReply:
        """Wait for every writer, compare digests, install, refresh; then the version is real.

        What was prepared is not looked at again.  A repeat of the last commit gets the same answer.

        Raises:
            DeadlineError: A writer did not report this version in time.
            VerifyError: A digest differs.
            IdentityError: A kernel tensor moved since the push began.
        """
        if not self.dirty and (body.push_id, body.version) in self._committed:
            return self._committed[body.push_id, body.version]
        epoch, laps = self._current(body.epoch), Laps()
        epoch.check_pushing(body)
        plain = epoch.plain
        if plain:
            # Torn if a digest differs, whatever was renewed meanwhile: so it need not be awaited.
            epoch.check_landed(body, laps, self._renew)
        else:
            epoch.check_landed(body, laps)
            self._check_place()
        self._install(epoch)
        laps.end("install")
        if not plain:
            self.adapter.refresh()
        self.adapter.synchronize()
        self._history.settle()
        self.version, self.dirty, epoch.pushing = body.version, False, None
        laps.end("refresh")
        if not epoch.proofs.proven:
            self.close()  # the layout is another one now: the next push makes a new rendezvous
        over, kept = not epoch.proofs.proven, self._history.rollback_to
        reply = CommitReply(body.version, laps.seconds, epoch_over=over, rollback_to=kept)
        self._committed = {(body.push_id, body.version): reply}
        return reply

    def _renew(self) -> None:
        # the digests are of the registered memory: is it still what the engine serves with?
        self._check_place()
        self.adapter.refresh()

    def _install(self, epoch: Epoch) -> None:
        self.adapter.synchronize()
        target, proofs = epoch.target, epoch.proofs
        rebuilt = None if proofs.proven else load_apart(self._prover, target, epoch.manifest)
        # torn if it ends in the middle: the shadow's bytes are whole and checked, the engine is
        # paused, but half of them are live (WS-4)
        whole = not (self.dirty or epoch.exposed)
        self.dirty = True
        if rebuilt is None:
            self._history.exchange(self.version, proofs, whole=whole)
        install(self._prover, target, proofs)
        if rebuilt is not None:  # what is live now is what the next pushes are proven by
            found = self._prover.prove(target.copies, rebuilt.__getitem__, full=False)
            self._attachment.accept(target.copies, found)

    def abort(self, body: AbortBody) -> AbortReply:
        """Give a push up.  ``dirty`` stays until a whole push: writes may have landed."""
        if self._epoch is not None and (push := self._epoch.pushing) is not None:
            logger.warning("push %s of version %d is aborted", push.push_id, push.version)
            # a late write of this epoch must find nothing that a later push trusts (WS-8)
            self.close()
        return AbortReply(self.dirty, self.version, self._history.rollback_to)

    def rollback(self, body: RollbackBody) -> RollbackReply:
        """The engine is paused: serve the version before, byte for byte (WS-1).

        Also after a commit that failed half way.  A repeat gets the same answer.

        Raises:
            NoPreviousError: That version is not kept; nothing was changed.
            IdentityError: A kernel tensor moved: the same.
        """
        laps = Laps()
        if not (self.version == body.to < self._rolled_back_from and not self.dirty):
            self.adapter.synchronize()
            self._check_place()
            given_up = max(self.version, self._newest_begun)
            was, self.dirty = self.dirty, True
            try:
                self._history.put_back(body.to)
            except NoPreviousError:
                self.dirty = was
                raise
            laps.end("install")
            self.adapter.refresh()
            self.adapter.synchronize()
            # versions only grow: whatever comes next is newer than what was given up
            self._rolled_back_from = max(self._rolled_back_from, given_up)
            self.version, self.dirty, self._committed = body.to, False, {}
        laps.end("refresh")
        return RollbackReply(self.version, self._rolled_back_from, laps.seconds)

    def reload(self) -> ReloadReply:
        """The engine is paused: serve again what it was started with, as version 0.

        Raises:
            NoCheckpointError, EngineError, RefusedError, VerifyError: See :func:`reload`.
        """
        laps = Laps()

        def started() -> None:
            self.close()
            self._history.drop()
            self.dirty = True

        reload(self._prover, self._attachment, started)
        self.version, self.dirty, self._committed = 0, False, {}
        laps.end("install")
        return ReloadReply(laps.seconds)

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
        return ChecksumsReply(checksums(self._prover, self._attachment.proofs))

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
        found = differences(epoch, self._prover, body.ranks)
        return VerifyReply(len(epoch.target.memory), sorted(found.items()))
