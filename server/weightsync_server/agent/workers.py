"""What the agent asks the workers, in the words of the worker messages."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from weightsync.codec import pack
from weightsync.errors import EngineDetachedError, EngineError
from weightsync.manifest import TensorSpec
from weightsync.protocol import Difference, PushMode, Refusal, WorkerOffer
from weightsync.state_events import Aborted, Attached
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
from weightsync_server.agent.engine_client import Answer
from weightsync_server.agent.engines import Engines
from weightsync_server.agent.headroom import check_headroom
from weightsync_server.agent.status import EngineStatus, HeadroomStatus, WorkerStatus

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShadowTerms:
    """Where shadows lie, what they may take, and whether engines without room are refused."""

    device: str = "same"
    max_nbytes: int | None = None
    required: bool = False


class Workers:
    """The workers of all engines.  Used on the event loop only."""

    def __init__(self, engines: Engines, shadow: ShadowTerms) -> None:
        self._engines = engines
        self._shadow = shadow
        self.engines = [EngineStatus(url=client.base_url) for client in engines.clients]
        self.status: list[WorkerStatus] = []
        #: the process behind each place, as last described
        self.instances: dict[str, str] = {}
        #: the API server processes that are known to front these workers
        self._servers: set[str] = set()

    async def describe(self, timeout_s: float) -> list[Answer[DescribeReply]]:
        """What every worker is and holds now."""
        return await self._engines.ask("describe", DescribeReply, timeout_s=timeout_s)

    async def still_there(self, probe_timeout_s: float) -> bool:
        """Whether the engines that answer are those that were attached."""
        servers = {str(info["instance"]) for info in await self._engines.info(probe_timeout_s)}
        if servers <= self._servers:
            return True
        # one engine may have several API server processes: only the workers can tell
        answers = await self.describe(probe_timeout_s)
        if {a.place: a.instance for a in answers} != self.instances:
            return False
        self._servers |= servers
        return True

    async def attach(
        self, proof: str, *, again: bool, timeout_s: float, epoch_over: bool = False
    ) -> Attached:
        """Describe all workers and, where they are new or ``again``, have them prove themselves.

        A dirty worker is not asked to: its weights are known not to be what it was loaded with.

        Args:
            proof: See :class:`weightsync.worker_messages.AttachBody`.
            again: Prove what was proven, too.
            timeout_s: For all of it.
            epoch_over: A push broke off, or nothing is known of one.  Whatever epoch there is ends
                first: a command that is still on its way must not change what the workers are
                about to describe (WS-8).
        """
        infos = await self._engines.info(timeout_s)
        # first: it voids rollbacks and reloads that are still on their way
        paused = await self._engines.agree_on_pause(timeout_s)
        if epoch_over:
            await self.close(timeout_s=timeout_s)
        answers = await self.describe(timeout_s)
        same = {a.place: a.instance for a in answers} == self.instances
        dirty = any(a.body.dirty for a in answers)
        known = {w.place: w for w in self.status} if same else {}
        status = [_described(a, known.get(a.place)) for a in answers]
        if not dirty and (again or len(known) < len(status)):
            proofs = await self._engines.ask(
                "attach",
                AttachReply,
                body=AttachBody(proof, self._shadow.device),
                timeout_s=timeout_s,
            )
            for worker, proven in zip(status, proofs, strict=True):
                _add_proof(worker, proven.body)
            if self._shadow.required:
                check_headroom(status)
        self.status = status
        self.instances = {a.place: a.instance for a in answers}
        self.engines = [
            _identified(client.base_url, info)
            for client, info in zip(self._engines.clients, infos, strict=True)
        ]
        self._servers = {engine.instance for engine in self.engines}
        return Attached(
            versions=frozenset(a.body.version for a in answers),
            dirty=dirty,
            paused=paused,
            epoch=max(a.body.epoch for a in answers),
            same=same,
            rollback_to=common(a.body.rollback_to for a in answers),
            rolled_back_from=max(a.body.rolled_back_from for a in answers),
        )

    async def layout(
        self,
        epoch: int,
        session: str,
        manifest: tuple[TensorSpec, ...],
        mode: PushMode,
        *,
        timeout_s: float,
    ) -> tuple[list[WorkerOffer], int | None]:
        """Have every worker trace and register.

        Returns:
            What each offers, sorted by place; the version before, if all still keep it.
        """
        shadow = self._shadow
        answers = self._same(
            await self._engines.ask(
                "layout",
                LayoutReply,
                body=LayoutBody(epoch, session, manifest, mode, shadow.device, shadow.max_nbytes),
                timeout_s=timeout_s,
            )
        )
        offers = await asyncio.to_thread(lambda: [_offer(a) for a in answers])
        return offers, common(a.body.rollback_to for a in answers)

    async def connect(self, bodies: Sequence[ConnectBody], *, timeout_s: float) -> None:
        """Tell every worker who will write what to it.  ``bodies`` in the order of the places."""
        self._same(await self._engines.tell("connect", timeout_s=timeout_s, **self._each(bodies)))

    async def begin(
        self, epoch: int, version: int, push_id: str, *, live: bool, timeout_s: float
    ) -> list[Answer[None]]:
        """Every worker checks its tensors' identity; one whose live memory is written is dirty."""
        body = BeginBody(epoch, version, push_id, live)
        answers = self._same(await self._engines.tell("begin", body=body, timeout_s=timeout_s))
        for worker in self.status:
            worker.dirty = worker.dirty or live
        return answers

    async def prepare(
        self, bodies: Sequence[PrepareBody], *, timeout_s: float
    ) -> list[Answer[PrepareReply]]:
        """Every worker checks what was written so far; where its time went."""
        return self._same(
            await self._engines.ask(
                "prepare", PrepareReply, timeout_s=timeout_s, **self._each(bodies)
            )
        )

    async def commit(
        self, bodies: Sequence[CommitBody], version: int, *, timeout_s: float
    ) -> list[Answer[CommitReply]]:
        """Every worker checks and installs; where its time went."""
        answers = self._same(
            await self._engines.ask(
                "commit", CommitReply, timeout_s=timeout_s, **self._each(bodies)
            )
        )
        if wrong := [a for a in answers if a.body.version != version]:
            raise EngineError(
                f"worker {wrong[0].place} committed version {wrong[0].body.version}, not {version}",
                hint="do all workers run the same version of weightsync?",
            )
        for worker in self.status:
            worker.dirty, worker.version = False, version
        return answers

    async def rollback(self, to: int, *, timeout_s: float) -> list[Answer[RollbackReply]]:
        """Every worker puts the version before back."""
        answers = self._same(
            await self._engines.ask(
                "rollback", RollbackReply, body=RollbackBody(to), timeout_s=timeout_s
            )
        )
        for worker in self.status:
            worker.dirty, worker.version = False, to
        return answers

    async def reload(self, *, timeout_s: float) -> list[Answer[ReloadReply]]:
        """Every worker loads the engine's checkpoint again."""
        answers = self._same(await self._engines.ask("reload", ReloadReply, timeout_s=timeout_s))
        for worker in self.status:
            worker.dirty, worker.version = False, 0
        return answers

    async def abort(self, push_id: str, *, timeout_s: float) -> Aborted:
        """Every worker gives the push up, and tells what it holds."""
        answers = self._same(
            await self._engines.ask(
                "abort", AbortReply, body=AbortBody(push_id), timeout_s=timeout_s
            )
        )
        for worker, answer in zip(self.status, answers, strict=True):
            worker.dirty, worker.version = answer.body.dirty, answer.body.version
        return Aborted(
            frozenset(a.body.version for a in answers),
            any(a.body.dirty for a in answers),
            common(a.body.rollback_to for a in answers),
        )

    async def close(self, *, timeout_s: float) -> None:
        """Every worker drops its peers and registrations: late writes find nothing (WS-8)."""
        await self._engines.tell("close", timeout_s=timeout_s)

    async def checksums(self, *, timeout_s: float) -> dict[str, str]:
        """SHA-256 of every final kernel tensor; with several workers the place comes first."""
        answers = self._same(
            await self._engines.ask("checksums", ChecksumsReply, timeout_s=timeout_s)
        )
        return {
            name if len(answers) == 1 else f"{a.place}/{name}": digest
            for a in answers
            for name, digest in a.body.sha256.items()
        }

    async def verify(
        self, bodies: Sequence[VerifyBody], *, timeout_s: float
    ) -> tuple[int, list[Difference]]:
        """How many kernel tensors were compared, and those that differ, sorted by place."""
        answers = self._same(
            await self._engines.ask(
                "verify", VerifyReply, timeout_s=timeout_s, **self._each(bodies)
            )
        )
        return sum(a.body.kernel_tensors for a in answers), [
            Difference(place=a.place, tensor=tensor, what=what)
            for a in answers
            for tensor, what in a.body.differs
        ]

    def _each(self, bodies: Sequence[object]) -> Mapping[str, Any]:
        if len(bodies) != len(self.status):
            raise EngineDetachedError(
                f"there are {len(self.status)} workers now, not {len(bodies)}",
                hint="make a new rendezvous",
            )
        if len(bodies) == 1:
            return {"body": bodies[0]}
        return {"bodies": {w.place: b for w, b in zip(self.status, bodies, strict=True)}}

    def _same(self, answers: list[Answer[T]]) -> list[Answer[T]]:
        """Answers of the processes that were attached; others know nothing of the epoch (WS-8)."""
        if {a.place: a.instance for a in answers} != self.instances:
            raise EngineDetachedError(
                "the engine's workers are other processes than those that were attached",
                hint="the agent joins the new ones by itself; then make a new rendezvous",
            )
        return answers


def common(values: Iterable[int | None]) -> int | None:
    """What all of them are; None: they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _identified(url: str, info: Mapping[str, Any]) -> EngineStatus:
    warnings = [str(warning) for warning in info.get("warnings", [])]
    for warning in warnings:
        log.warning("%s: %s", url, warning)
    return EngineStatus(
        url=url,
        name=str(info.get("engine", "")),
        version=str(info.get("version", "")),
        model=str(info.get("model", "")),
        instance=str(info["instance"]),
        warnings=warnings,
    )


def _described(answer: Answer[DescribeReply], known: WorkerStatus | None) -> WorkerStatus:
    told = {
        "place": answer.place,
        "instance": answer.instance,
        "pid": answer.body.pid,
        "version": answer.body.version,
        "dirty": answer.body.dirty,
        "checkpoint": answer.body.checkpoint,
    }
    return WorkerStatus.model_validate((known.model_dump() if known else {}) | told)


def _add_proof(worker: WorkerStatus, proof: AttachReply) -> None:
    worker.kernel_tensors = proof.kernel_tensors
    worker.direct, worker.staged = proof.direct, proof.staged
    worker.refusals = [Refusal(tensor=t, reason=r) for t, r in proof.refusals]
    worker.warnings = list(proof.warnings)
    worker.attach_seconds = dict(proof.seconds)
    worker.shadow_headroom = [HeadroomStatus(**asdict(memory)) for memory in proof.headroom]
    for warning in proof.warnings:
        log.warning("%s: %s", worker.place, warning)
    for refusal in worker.refusals:
        log.warning("%s: %s cannot be pushed: %s", worker.place, refusal.tensor, refusal.reason)


def _offer(answer: Answer[LayoutReply]) -> WorkerOffer:
    regions = answer.body.layout.regions
    return WorkerOffer(
        place=answer.place,
        transport=answer.body.transport,
        metadata=base64.b64encode(answer.body.metadata).decode("ascii"),
        layout=pack(answer.body.layout),
        direct=sum(r.mode == "direct" for r in regions),
        staged=sum(r.mode == "staged" for r in regions),
        nbytes=sum(r.nbytes for r in regions),
        shadow=sum(r.mode == "shadow" for r in regions),
    )
