"""The inference side of a push, inside one worker: attach, layout, connect, begin, commit, abort.

The agent drives it (through the engine's fan-out), one call at a time, on the worker's own
thread.  It trusts nobody: identity is checked before bytes may land, digests before they count,
and a worker whose live weights may be half written says so (``dirty``) until a whole push.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable

import torch

from weightsync import digest
from weightsync.coverage import check_writes
from weightsync.errors import (
    DeadlineError,
    LayoutError,
    NoSessionError,
    StaleEpochError,
    StaleVersionError,
    VerifyError,
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
)
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.checkpoint import Checkpoint
from weightsync_server.receiver.install import materialise, transplant
from weightsync_server.receiver.kernel import (
    Identity,
    check_identities,
    flat_bytes,
    same_bytes,
    tensor_at,
)
from weightsync_server.receiver.proof import Proofs, Prover
from weightsync_server.receiver.target import Copies, Target, copies_by_tensor
from weightsync_server.receiver.tracer import trace

logger = logging.getLogger(__name__)

_POLL_S = 0.0005
_COLUMNS = 1024


class _Epoch:
    """Everything that is thrown away when an epoch ends (WS-8)."""

    def __init__(
        self, number: int, manifest: Manifest, target: Target, transport: Transport
    ) -> None:
        self.number = number
        self.manifest = manifest
        self.target = target
        self.transport = transport
        self.writes: dict[int, list[tuple[int, int, int]]] = {}
        self.seen: set[bytes] = set()
        self.pushing = 0

    def poll(self) -> None:
        for messages in self.transport.notifications().values():
            self.seen.update(messages)

    def close(self) -> None:
        self.transport.close()


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
        self._epoch: _Epoch | None = None

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
        """Prove, once, how bytes may reach the kernel tensors.

        Weights that came from a push cannot be compared with the checkpoint any more; proofs that
        hold by identity are kept, and else the next push proves (see ``_first_install``).
        """
        start = time.perf_counter()
        warnings: list[str] = []
        self._drop_moved()
        folder = self.adapter.checkpoint()
        if self._proofs is None and self.version == 0 and not self.dirty and folder is not None:
            checkpoint = Checkpoint(folder)
            self._reference = copies_by_tensor(
                trace(self.adapter.new_twin(), self.adapter.load, checkpoint.manifest())
            )
            self._accept(
                self._prover.prove(self._reference, checkpoint.flat, full=body.proof == "full")
            )
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

    def _accept(self, proofs: Proofs) -> None:
        self._proofs = proofs
        self._identities = {}
        for unit in proofs.units:
            for name in unit.params.values():
                t = tensor_at(self.adapter.live, name)
                if proofs.mode(name) == "direct" and t is not None:
                    self._identities[name] = Identity.of(t)

    def _drop_moved(self) -> None:
        """Forget proofs of tensors that are not where they were; the epoch goes with them."""
        try:
            check_identities(self.adapter.live, self._identities)
        except LayoutError as error:
            logger.warning("%s", error)
            self._proofs, self._identities = None, {}
            self.close()

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
        manifest = Manifest(body.manifest)
        traced = trace(self.adapter.new_twin(), self.adapter.load, manifest)
        proofs = self._proofs or self._unproven(copies_by_tensor(traced))
        target = Target(self.adapter.place, self._prover, traced, proofs, manifest, self._reference)
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
        self._epoch = _Epoch(body.epoch, manifest, target, transport)
        return LayoutReply(type(transport).__name__, metadata, target.layout)

    def connect(self, body: ConnectBody) -> None:
        """Take in the writing ranks and prove that together they write every byte once (WS-7)."""
        epoch = self._current(body.epoch)
        check_writes(epoch.target.layout, {r.rank: r.writes for r in body.ranks})
        for rank in body.ranks:
            if rank.writes:
                epoch.transport.add_peer(rank.metadata)
                epoch.writes[rank.rank] = rank.writes

    def _current(self, number: int) -> _Epoch:
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
        """
        epoch = self._current(body.epoch)
        if not epoch.writes:
            raise NoSessionError("no rank is connected", hint="call /connect first")
        if body.version < self.version or (body.version == self.version and not self.dirty):
            raise StaleVersionError(
                f"version {body.version} is not newer than {self.version} at {self.adapter.place}",
                hint="versions only grow",
            )
        self.adapter.synchronize()
        try:
            check_identities(self.adapter.live, self._identities)
        except LayoutError:
            self._proofs, self._identities = None, {}
            self.close()
            raise
        epoch.pushing = body.version
        # from here on a write may land in live memory at any time (WS-4)
        self.dirty = self.dirty or len(epoch.target.staged) < len(epoch.target.memory)

    def commit(self, body: CommitBody) -> CommitReply:
        """Wait for every writer, compare digests, install, refresh; then the version is real.

        Raises:
            DeadlineError: A writer did not report this version in time.
            VerifyError: A digest differs.
        """
        epoch = self._current(body.epoch)
        if self.version == body.version and not self.dirty:
            return CommitReply(self.version, {})
        if epoch.pushing != body.version:
            raise NoSessionError(
                f"version {body.version} was never begun at {self.adapter.place}",
                hint="call /begin_update first",
            )
        marks = [time.perf_counter()]
        self._wait_for_writers(epoch, body)
        marks.append(time.perf_counter())
        self._check_digests(epoch, body)
        marks.append(time.perf_counter())
        proofs = self._proofs
        if proofs is None:
            self._first_install(epoch)
        else:
            self._install(epoch.target, proofs)
        self.adapter.refresh()
        self.adapter.synchronize()
        self.version, self.dirty, epoch.pushing = body.version, False, 0
        marks.append(time.perf_counter())
        if proofs is None:
            self.close()  # the layout is another one now: the next push makes a new rendezvous
        parts = ("writers", "digest", "install")
        return CommitReply(
            body.version, {p: b - a for p, a, b in zip(parts, marks, marks[1:], strict=False)}
        )

    def _wait_for_writers(self, epoch: _Epoch, body: CommitBody) -> None:
        want = {f"ws:{epoch.number}:{body.version}:{rank}".encode(): rank for rank in epoch.writes}
        deadline = time.monotonic() + body.timeout_s
        while True:
            epoch.poll()
            absent = [rank for message, rank in want.items() if message not in epoch.seen]
            if not absent:
                epoch.seen.clear()
                return
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"ranks {absent} did not report version {body.version} to "
                    f"{self.adapter.place} within {body.timeout_s:.1f} s of the commit",
                    hint="their writes are lost or late: push again",
                    ranks=absent,
                    phase="commit",
                )
            time.sleep(_POLL_S)

    def _check_digests(self, epoch: _Epoch, body: CommitBody) -> None:
        sent = {r.rank: r.digests for r in body.ranks}
        for rank, writes in epoch.writes.items():
            want = sent.get(rank, [])
            if len(want) != len(writes):
                raise VerifyError(
                    f"rank {rank} sent {len(want)} digests for {len(writes)} writes",
                    hint="trainer and agent must have the same version",
                )
            got = digest.digests([epoch.target.piece(*w) for w in writes])
            bad = [w for w, a, b in zip(writes, got, want, strict=True) if a != b]
            if bad:
                region = epoch.target.layout.regions[bad[0][0]].name
                raise VerifyError(
                    f"{len(bad)} of {len(writes)} writes of rank {rank} differ from what it sent; "
                    f"the first is {bad[0][2]} bytes at {bad[0][1]} of {region} at "
                    f"{self.adapter.place}",
                    hint="push again; if it repeats, look at the network cards and at who else "
                    "writes to this memory",
                    tensor=region,
                )

    def _install(self, target: Target, proofs: Proofs) -> None:
        self.dirty = True
        for unit in proofs.units:
            if unit.kind != "direct":
                made, changed, live = self._prover.finished(unit, target.memory)
                transplant(live, made, changed, replaceable=self.adapter.replaceable)

    def _first_install(self, epoch: _Epoch) -> None:
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
        if self._epoch is not None and self._epoch.pushing:
            logger.warning("push %s of version %d is aborted", body.push_id, self._epoch.pushing)
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
        """SHA-256 of every final kernel tensor; of packed weights, of what they compute."""
        live = self.adapter.live
        self.adapter.synchronize()
        found: dict[str, str] = {}
        for name, p in [*live.named_parameters(), *_persistent(live)]:
            found[name] = hashlib.sha256(flat_bytes(p).cpu().numpy()).hexdigest()
        units = [] if self._proofs is None else self._proofs.units
        for unit in units:
            module = live.get_submodule(unit.path)
            for leaf, name in unit.params.items():
                like = self._prover.load_format(name)
                if unit.kind == "direct" or like.ndim != 2:
                    continue
                h = hashlib.sha256()
                for start in range(0, like.shape[1], _COLUMNS):
                    stop = min(start + _COLUMNS, like.shape[1])
                    columns = torch.arange(start, stop, device=self.adapter.device)
                    part = self.adapter.read_back(module, leaf, columns, like.shape[1])
                    if part is None:
                        break
                    h.update(flat_bytes(part).cpu().numpy())
                else:
                    found[f"{unit.path}.{leaf} (read back)"] = h.hexdigest()
        return ChecksumsReply(found)


def _persistent(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    keys = model.state_dict().keys()
    return [(name, b) for name, b in model.named_buffers() if name in keys]
