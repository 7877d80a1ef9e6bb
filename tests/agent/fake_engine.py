"""A reference fake engine: the real middleware, fake workers that post real replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import httpx
import uvicorn
from fastapi import FastAPI

from weightsync.codec import pack, unpack
from weightsync.errors import WeightSyncError
from weightsync.layout import KernelRegion, WorkerLayout, WorkerPlace
from weightsync.protocol import WorkerCommand, WorkerReply
from weightsync.worker_messages import (
    AbortReply,
    AttachReply,
    BeginBody,
    ChecksumsReply,
    CommitBody,
    CommitReply,
    ConnectBody,
    DescribeReply,
    Headroom,
    LayoutBody,
    LayoutReply,
    PrepareBody,
    PrepareReply,
    ReloadReply,
    RollbackBody,
    RollbackReply,
    VerifyReply,
)
from weightsync_server.middleware import WeightsyncMiddleware
from weightsync_server.secret import HEADER

SECRET = "s3cret-of-the-tests"


class QuietServer(uvicorn.Server):
    """Leaves the test process's signal handlers alone, and stops without uvicorn's 0.1 s tick."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not self.should_exit:  # noqa: ASYNC110 - uvicorn's flag is no event
            await asyncio.sleep(0.005)


def listening_socket(port: int = 0) -> socket.socket:
    sock = socket.socket(proto=socket.IPPROTO_TCP)  # named: asyncio sets TCP_NODELAY
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(128)
    return sock


class Running:
    """A uvicorn server on this event loop."""

    def __init__(self, server: uvicorn.Server, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.task = asyncio.create_task(server.serve(sockets=[sock]))

    async def started(self) -> Running:
        async with asyncio.timeout(10):
            while not self.server.started:
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.005)
        return self

    async def stop(self) -> None:
        self.server.should_exit = True
        async with asyncio.timeout(10):
            await self.task
        self.sock.close()


@dataclass
class FakeWorker:
    place: WorkerPlace
    instance: str
    version: int = 0
    dirty: bool = False
    epoch: int = 0
    received: list[WorkerCommand] = field(default_factory=list)
    connect: ConnectBody | None = None
    #: whether an aborted push leaves live memory touched (direct) or not (staged)
    staged: bool = False
    #: as after the first push into an engine without a checkpoint
    first_push: bool = False
    shadow: bool = False
    rollback_to: int | None = None
    checkpoint: bool = False
    rolled_back_from: int = 0
    headroom: list[Headroom] = field(default_factory=list)

    def run(self, command: WorkerCommand) -> object:
        self.received.append(command)
        body = command.body_for(str(self.place))
        match command.op:
            case "describe":
                return DescribeReply(
                    str(self.place), self.instance, "fake", "1.0", self.version, self.dirty,
                    self.epoch, 1, checkpoint=self.checkpoint, rollback_to=self.rollback_to,
                    rolled_back_from=self.rolled_back_from,
                )  # fmt: skip
            case "attach":
                refusals = [("odd.weight", "unproven")]
                return AttachReply(3, 2, 1, refusals, ["mind the gap"], {}, self.headroom)
            case "layout":
                asked = unpack(body, LayoutBody)
                self.epoch, self.shadow = asked.epoch, asked.mode == "shadow"
                regions = (
                    KernelRegion("a", "float32", (4,), 16, "direct", 4096),
                    KernelRegion("b", "float32", (2,), 8, "staged", 8192),
                )
                layout = WorkerLayout(self.place, regions, ())
                return LayoutReply("fake", b"meta", layout, self.rollback_to)
            case "connect":
                self.connect = unpack(body, ConnectBody)
            case "begin":
                live = unpack(body, BeginBody).live
                self.rollback_to = None
                self.dirty = self.dirty or (live and not self.staged and not self.shadow)
            case "prepare":
                unpack(body, PrepareBody)
                return PrepareReply({"digest": 0.25})
            case "commit":
                commit = unpack(body, CommitBody)
                self.rollback_to = self.version if self.shadow else None
                self.version, self.dirty = commit.version, False
                seconds = {"digest": 0.25, "install": 0.5}
                return CommitReply(self.version, seconds, self.first_push, self.rollback_to)
            case "abort":
                return AbortReply(self.dirty, self.version, self.rollback_to)
            case "reload":
                self.version, self.dirty, self.rollback_to = 0, False, None
                return ReloadReply({"install": 0.5})
            case "rollback":
                assert unpack(body, RollbackBody).to == self.rollback_to
                self.rolled_back_from = max(self.version, self.rolled_back_from)
                self.version, self.dirty, self.rollback_to = self.rollback_to, False, None
                return RollbackReply(self.version, self.rolled_back_from, {"install": 0.5})
            case "checksums":
                return ChecksumsReply({"a": "00" * 32})
            case "verify":
                return VerifyReply(2, [("b", "other bytes")] if self.place.tp else [])
        return None


class FakeClient:
    """Looks like vLLM's engine client."""

    engine_name = "fake"
    engine_version = "1.0"
    model_path = "/models/fake"

    def __init__(self, workers: int = 1) -> None:
        self.workers = [FakeWorker(WorkerPlace(tp=i), uuid.uuid4().hex) for i in range(workers)]
        self.world_size = workers
        self.paused = False
        self.errored = False
        self.calls: list[str] = []
        #: calls and ops that never answer; ops that fail, and with what; places that keep silent
        self.hang: set[str] = set()
        self.fail: dict[str, Exception] = {}
        self.silent: set[str] = set()
        #: ops that never return, though every worker has answered
        self.linger: set[str] = set()
        #: what fails at the workers of these places only (default: all)
        self.fail_at: set[str] | None = None

    @property
    def ops(self) -> list[str]:
        return [c for c in self.calls if c not in ("describe", "is_paused")]

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hang:
            await asyncio.sleep(3600)
        if name in self.fail and not isinstance(self.fail[name], WeightSyncError):
            raise self.fail[name]

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        assert not clear_cache
        self.paused = True
        await self._called("pause")

    async def resume_generation(self) -> None:
        torn = any(w.dirty for w in self.workers) or len({w.version for w in self.workers}) > 1
        assert not torn, "a torn engine was resumed"
        await self._called("resume")
        self.paused = False

    async def is_paused(self) -> bool:
        await self._called("is_paused")
        return self.paused

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        assert reset_running_requests
        assert self.paused
        await self._called("reset_prefix_cache")
        return "reset_returns_false" not in self.fail

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):  # noqa: ASYNC109
        assert method == "weightsync_call"
        command = WorkerCommand.model_validate_json(kwargs["command"])
        await self._called(command.op)
        await asyncio.gather(*(self._answer(w, command) for w in self.workers))
        if command.op in self.linger:
            await asyncio.sleep(3600)
        return [None] * len(self.workers)

    async def _answer(self, worker: FakeWorker, command: WorkerCommand) -> None:
        worker.place = replace(worker.place, engine=command.engine)
        place = str(worker.place)
        error = self.fail.get(command.op)
        body, problem = "", None
        if error is not None and (self.fail_at is None or place in self.fail_at):
            assert isinstance(error, WeightSyncError)
            problem = error.to_problem()
        else:
            result = worker.run(command)
            body = "" if result is None else pack(result)
        if place in self.silent:
            return
        reply = WorkerReply(
            call_id=command.call_id,
            place=place,
            instance=worker.instance,
            body=body,
            problem=problem,
        )
        async with httpx.AsyncClient(trust_env=False) as http:
            await http.post(
                command.reply_url, content=reply.model_dump_json(), headers={HEADER: SECRET}
            )


class FakeEngine:
    """An engine process that can be stopped and started again."""

    def __init__(self, workers: int = 1) -> None:
        self.n = workers
        self.client = FakeClient(workers)
        self.running: Running | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> FakeEngine:
        app = FastAPI()
        app.state.engine_client = self.client
        app.add_middleware(WeightsyncMiddleware, secret=SECRET)

        @app.get("/v1/ping")
        async def ping():
            return {"pong": True}

        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=0.1, ws="none"
        )
        sock = listening_socket(self.port)
        self.port = sock.getsockname()[1]
        self.running = await Running(QuietServer(config), sock).started()
        return self

    async def stop(self) -> None:
        if self.running is not None:
            running, self.running = self.running, None
            await running.stop()

    async def restart(self) -> None:
        """Another process: other instances, the weights of the checkpoint."""
        await self.stop()
        self.client = FakeClient(self.n)
        await self.start()
