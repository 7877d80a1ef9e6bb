"""The calls of the HTTP API: a request becomes an ask, once, and its outcome an answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from weightsync.errors import (
    NoCheckpointError,
    ProtocolMismatchError,
    PushInProgressError,
    WeightSyncError,
    from_problem,
)
from weightsync.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    AttachRequest,
    BeginRequest,
    CommitRequest,
    ConnectRequest,
    InitTransferRequest,
    InitTransferResponse,
    Message,
    PauseRequest,
    PrepareRequest,
    ReloadRequest,
    ResumeRequest,
    RollbackRequest,
    StepResponse,
    VerifyRequest,
    VerifyResponse,
)
from weightsync.state import check_rollback, check_verify, step
from weightsync.state_events import (
    AbortAsked,
    Ask,
    AttachAsked,
    BeginAsked,
    CommitAsked,
    ConnectAsked,
    InitAsked,
    PauseAsked,
    PrepareAsked,
    ReloadAsked,
    ResumeAsked,
    RollbackAsked,
)
from weightsync.worker_messages import (
    VerifyBody,
)
from weightsync_server.agent.aside import aside
from weightsync_server.agent.bodies import Bodies, fingerprint, packed_nbytes
from weightsync_server.agent.joined import joined, pause_and
from weightsync_server.agent.journal import Record, Remembered
from weightsync_server.agent.once import Mark, Once
from weightsync_server.agent.pushes import Traffic
from weightsync_server.agent.service import Service
from weightsync_server.agent.work import Work

R = TypeVar("R", PrepareRequest, CommitRequest)

log = logging.getLogger(__name__)


class Calls:
    """The POSTs of the agent; each raises the WeightSyncError that its caller is to see.

    Args:
        service: Carries the asks out.
        engine_timeout_s: Seconds for requests that bring no deadline.
        max_unpacked_nbytes: Bytes that a packed record may have once inflated.
    """

    def __init__(
        self,
        service: Service,
        *,
        engine_timeout_s: float,
        max_unpacked_nbytes: int,
    ) -> None:
        self._service = service
        self._engine_timeout_s = engine_timeout_s
        self._bodies = Bodies(max_unpacked_nbytes)
        self._once = Once(self._remember)

    def recall(self, record: Record) -> None:
        """Answer repeats of what an agent before this one answered."""
        for push_id, calls in record.answers.items():
            for name, remembered in calls.items():
                if name == "pause" and push_id == record.state.owner:
                    continue  # whether the engine stands still is asked anew (WS-1)
                self._once.recall((name, push_id), remembered.asked, partial(_answered, remembered))

    async def attach(self, request: AttachRequest) -> StepResponse:
        """``POST /attach``."""
        extra = {"by_hand": True, "proof": request.proof}
        return await self._step(AttachAsked(), request, request.timeout_s, extra=extra)

    async def pause(self, request: PauseRequest) -> StepResponse:
        """``POST /pause``."""
        event = PauseAsked(request.push_id)
        if request.push_id is None:
            return await self._step(event, request, request.timeout_s)
        return await self._push_step("pause", request.push_id, event, request)

    async def resume(self, request: ResumeRequest) -> StepResponse:
        """``POST /resume``."""
        event = ResumeAsked(request.push_id)
        if request.push_id is None:
            return await self._step(event, request, self._engine_timeout_s)
        return await self._push_step("resume", request.push_id, event, request)

    async def begin(self, request: BeginRequest) -> StepResponse:
        """``POST /begin_update``.  A repeat also tells that the push is still alive."""
        shadow = request.mode == "shadow"
        event = BeginAsked(request.session, request.epoch, request.push_id, request.version, shadow)
        # a push whose shadow holds only a part of it begins a second time, when it has paused
        name = "begin_update shadow" if shadow else "begin_update"
        begin = partial(self._push_step, name, request.push_id, event, request, keep_errors=True)
        if request.pause is None or self._once.knows((name, request.push_id)):
            return await begin()
        return await pause_and(self._service.state, event, partial(self._paused, request), begin)

    async def _paused(self, request: BeginRequest | CommitRequest) -> StepResponse:
        mode, push_id = request.pause or "keep", request.push_id
        return await self.pause(
            PauseRequest(mode=mode, timeout_s=request.pause_timeout_s, push_id=push_id)
        )

    async def prepare(self, request: PrepareRequest) -> StepResponse:
        """``POST /prepare_commit``."""
        event = PrepareAsked(request.session, request.epoch, request.push_id, request.version)
        return await self._checked_step("prepare_commit", event, request, self._bodies.prepare)

    async def commit(self, request: CommitRequest) -> StepResponse:
        """``POST /commit_update``."""
        event = CommitAsked(request.session, request.epoch, request.push_id, request.version)
        taken = time.monotonic()
        name, push_id = "commit_update", request.push_id
        commit = partial(self._checked_step, name, event, request, self._bodies.commit)
        if request.pause is None or self._once.knows((name, push_id)):
            done = await commit()
        else:
            pause = partial(self._paused, request)
            done = await pause_and(self._service.state, event, pause, commit)
        if not request.resume or done.state != "paused":
            return done
        after_s = time.monotonic() - taken
        try:
            resumed = await self.resume(ResumeRequest(push_id=request.push_id))
        except WeightSyncError as error:
            # the answer tells that it is paused; who asks for /resume then hears why
            log.warning("push %s is committed, and not resumed: %s", request.push_id, error)
            return done
        return joined(done, resumed, after_s)

    async def rollback(self, request: RollbackRequest) -> StepResponse:
        """``POST /rollback``."""

        async def work(begun: Mark) -> StepResponse:
            return await self._rollback(request, begun)

        if request.push_id is None:
            return await self._rollback(request, lambda: None)
        key = ("rollback", request.push_id)
        return await self._once.run(key, fingerprint(request), work)

    async def _rollback(self, request: RollbackRequest, begun: Mark) -> StepResponse:
        state = self._service.state
        check_rollback(state, request.version)
        holder = request.push_id
        if holder is None or state.owner != holder:
            # like a push of its own: what was paused by hand or by another push is refused
            holder = f"rollback-{uuid.uuid4().hex}"
        return await self._apart(RollbackAsked(holder), request, begun)

    async def reload(self, request: ReloadRequest) -> StepResponse:
        """``POST /reload``."""
        if bare := [w.place for w in self._service.workers.status if not w.checkpoint]:
            raise NoCheckpointError(
                f"{bare[0]} was started without a checkpoint on disk",
                hint="push again, all of it; or restart the engine",
            )
        return await self._apart(ReloadAsked(f"reload-{uuid.uuid4().hex}"), request, lambda: None)

    async def _apart(
        self,
        event: RollbackAsked | ReloadAsked,
        request: RollbackRequest | ReloadRequest,
        begun: Mark,
    ) -> StepResponse:
        """What brings no new bytes: the engine is paused for it, and resumed when it is whole."""
        holder = event.push_id
        pause = PauseRequest(mode=request.mode, push_id=holder)
        answer = await self._step(PauseAsked(holder), pause, request.timeout_s)
        seconds = answer.seconds
        try:
            answer = await self._step(event, request, request.timeout_s, begun)
        except WeightSyncError:
            # if it was refused, nothing has resumed the engine yet
            await self._step(AbortAsked(holder), request, self._engine_timeout_s)
            raise
        seconds = seconds | answer.seconds
        answer = await self._step(ResumeAsked(holder), request, self._engine_timeout_s)
        return answer.model_copy(update={"seconds": seconds | answer.seconds})

    async def abort(self, request: AbortRequest) -> StepResponse:
        """``POST /abort_update``."""
        event = AbortAsked(request.push_id)
        if self._service.state.owner == request.push_id:
            log.warning("push %s is aborted by its trainer: %s", request.push_id, request.reason)
        answer = await self._push_step("abort_update", request.push_id, event, request)
        if request.released is not None:
            self._service.release(request.push_id, request.released)
        return answer

    async def init_transfer(self, request: InitTransferRequest) -> InitTransferResponse:
        """``POST /init_transfer``."""
        if request.protocol_version != PROTOCOL_VERSION:
            raise ProtocolMismatchError(
                f"the trainer speaks protocol {request.protocol_version}, this agent "
                f"{PROTOCOL_VERSION}",
                hint="install the same version of weightsync on both sides",
                expected=PROTOCOL_VERSION,
                got=request.protocol_version,
            )
        manifest = await asyncio.to_thread(self._bodies.manifest, request)
        service, key = self._service, ("init_transfer", request.session)
        if service.state.session != request.session:
            self._once.forget_finished(key)

        async def work(begun: Mark) -> InitTransferResponse:
            event = InitAsked(request.session)
            made = self._work(event, request, request.timeout_s, begun)
            made.extra |= {"manifest": manifest.tensors, "mode": request.mode}
            await service.run(made)
            state = service.state
            return InitTransferResponse(
                session=request.session,
                epoch=state.epoch,
                # of a torn engine the newest version that any push reached, so that the one after
                # it is always new enough
                version=max(state.version, state.committed, state.lowest - 1),
                workers=made.result,
            )

        asked = (manifest.tensors, request.world_size, request.mode)
        return await self._once.run(key, asked, work)

    async def connect(self, request: ConnectRequest) -> StepResponse:
        """``POST /connect``."""
        event = ConnectAsked(request.session, request.epoch)
        key = ("connect", (request.session, request.epoch))
        state = self._service.state
        if not state.connected or state.epoch != request.epoch:
            # what was answered then is not so any more
            self._once.forget_finished(key)
        if not self._once.knows(key):
            step(self._service.state, event)
        bodies = await asyncio.to_thread(self._bodies.connect, request, self._workers)
        writers = {r.writer for r in request.ranks if r.writer is not None}
        fenced = self._service.fence.others(writers)
        bodies = [replace(body, fenced=fenced) for body in bodies]
        traffic = await asyncio.to_thread(Traffic.of, bodies)
        extra = {"bodies": bodies, "writers": writers, "traffic": traffic}

        async def work(begun: Mark) -> StepResponse:
            return await self._step(event, request, request.timeout_s, begun, extra)

        asked = await asyncio.to_thread(fingerprint, request)
        return await self._once.run(key, asked, work)

    async def checksums(self, timeout_s: float) -> tuple[int, dict[str, str]]:
        """``GET /checksums``: of which version, and they."""
        before = self._service.state
        if before.phase != "receiving":
            made = await self._service.workers.checksums(timeout_s=timeout_s)
            after = self._service.state
            if after.phase != "receiving" and after.version == before.version:
                return after.version, made
        raise PushInProgressError(
            f"push {self._service.state.owner or before.owner} writes, or wrote meanwhile",
            hint="ask again when it is over",
        )

    async def verify(self, request: VerifyRequest) -> VerifyResponse:
        """``POST /verify``.  It changes nothing, so it takes no turn and is never remembered."""
        check_verify(self._service.state, request.session, request.epoch)
        digests = await asyncio.to_thread(self._bodies.digests, request.ranks, self._workers)
        count, differs = await self._service.workers.verify(
            [VerifyBody(request.epoch, ranks) for ranks in digests], timeout_s=request.timeout_s
        )
        version = self._service.state.version
        return VerifyResponse(version=version, kernel_tensors=count, differs=differs)

    async def stop(self) -> None:
        """Cancel what runs."""
        await self._once.stop()

    # -------------------------------------------------------------- asks

    @property
    def _workers(self) -> int:
        return len(self._service.workers.status)

    async def _push_step(
        self,
        name: str,
        push_id: str,
        event: Ask,
        request: Message,
        *,
        keep_errors: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> StepResponse:
        self._service.touch(push_id)
        timeout_s: float = getattr(request, "timeout_s", self._engine_timeout_s)

        async def work(begun: Mark) -> StepResponse:
            return await self._step(event, request, timeout_s, begun, extra)

        asked = await aside(packed_nbytes(request), fingerprint, request)
        return await self._once.run((name, push_id), asked, work, keep_errors=keep_errors)

    def _remember(self, key: Hashable, asked: Hashable, task: asyncio.Task[Any]) -> None:
        """A push's answer goes into the journal; a rendezvous may simply be made again."""
        match key:
            case (str(name), str(push_id)) if name != "init_transfer":
                failed = task.exception()
                if failed is None:
                    remembered = Remembered(asked=str(asked), answer=task.result().model_dump())
                elif isinstance(failed, WeightSyncError):
                    remembered = Remembered(asked=str(asked), problem=failed.to_problem())
                else:
                    return
                self._service.remember(push_id, name, remembered)

    async def _checked_step(
        self,
        name: str,
        event: PrepareAsked | CommitAsked,
        request: R,
        bodies_of: Callable[[R, int], Sequence[object]],
    ) -> StepResponse:
        self._service.fence.written(event.push_id)  # nobody may say this before it is so
        if not self._once.knows((name, event.push_id)):
            step(self._service.state, event)  # refused before anything big is unpacked
        bodies = await aside(packed_nbytes(request), bodies_of, request, self._workers)
        return await self._push_step(
            name, event.push_id, event, request, keep_errors=True, extra={"bodies": bodies}
        )

    async def _step(
        self,
        event: Ask,
        request: Message,
        timeout_s: float,
        begun: Mark = lambda: None,
        extra: dict[str, Any] | None = None,
    ) -> StepResponse:
        work = self._work(event, request, timeout_s, begun)
        work.extra |= extra or {}
        await self._service.run(work)
        state = self._service.state
        return StepResponse(
            state=state.phase, version=state.version, seconds=work.seconds, spans=work.spans
        )

    def _work(self, event: Ask, request: Message, timeout_s: float, begun: Mark) -> Work:
        return Work(event, time.monotonic() + timeout_s, request, begun)


def _answered(remembered: Remembered) -> StepResponse:
    if remembered.problem is not None:
        raise from_problem(remembered.problem)
    return StepResponse.model_validate(remembered.answer)
