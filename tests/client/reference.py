"""An agent over real HTTP with workers in this process: the state machine, no engine."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from weightsync import protocol as p
from weightsync import state as st
from weightsync.codec import pack, unpack
from weightsync.coverage import check_writes
from weightsync.digest import digests
from weightsync.dtypes import itemsize
from weightsync.errors import AuthError, ManifestError, VerifyError, WeightSyncError
from weightsync.layout import CopyRecord, KernelRegion, Scratch, WorkerLayout, WorkerPlace
from weightsync.manifest import Manifest, TensorSpec
from weightsync.state_events import (
    AbortAsked,
    Aborted,
    BeginAsked,
    CommitAsked,
    Committed,
    ConnectAsked,
    Connected,
    InitAsked,
    PauseAsked,
    Paused,
    PushFailed,
    ResumeAsked,
    Resumed,
    SessionOpened,
)
from weightsync.transport.base import LocalMemory, Transport
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync_client import Deadlines

#: short enough for a test, long enough for two busy cores
QUICK = Deadlines(
    connect_s=2, status_s=5, rendezvous_s=10, pause_s=5, begin_s=5, write_s=5, commit_s=10,
    resume_s=5, abort_s=5, grace_s=0.5,
)  # fmt: skip


@dataclass
class Region:
    """A kernel tensor: each part is (tensor, rows) of a checkpoint tensor, one behind another."""

    name: str
    dtype: str
    parts: list[str]
    transposed: bool = False


#: what the engine's loader would make of a manifest: one region a tensor that is no alias
def plain_regions(manifest: Manifest) -> list[Region]:
    return [Region(t.name, t.dtype, [t.name]) for t in manifest if not t.alias_of and t.numel]


class Worker:
    def __init__(self, make_transport: Callable[[], Transport], place: WorkerPlace) -> None:
        self.make_transport = make_transport
        self.place = place
        self.buffers: dict[str, torch.Tensor] = {}
        self.transport: Transport | None = None
        self.layout: WorkerLayout | None = None
        self.writes: dict[int, list[tuple[int, int, int]]] = {}
        self.seen: list[bytes] = []
        self.scratch = torch.zeros(8192, dtype=torch.uint8)

    def open(self, manifest: Manifest, wanted: list[Region]) -> p.WorkerOffer:
        self.close()
        self.transport = self.make_transport()
        self.layout = self.lay_out(manifest, wanted)
        regions = self.layout.regions
        memory = [*regions, *([self.layout.scratch] if self.layout.scratch else [])]
        self.transport.register([LocalMemory(m.addr, m.nbytes) for m in memory])
        return p.WorkerOffer(
            place=str(self.place),
            transport="inmemory",
            metadata=base64.b64encode(self.transport.metadata()).decode(),
            layout=pack(self.layout),
            direct=len(regions),
            staged=0,
            nbytes=sum(r.nbytes for r in regions),
        )

    def lay_out(self, manifest: Manifest, wanted: list[Region]) -> WorkerLayout:
        regions, records = [], []
        for index, region in enumerate(wanted):
            offset = 0
            for name in region.parts:
                spec = manifest.by_name.get(name)
                if spec is None:
                    raise ManifestError(f"{name!r} is missing", hint="hand it over")
                shape = spec.shape
                strides = tuple(torch.empty(shape, device="meta").stride())
                dst = tuple(torch.empty(shape[::-1], device="meta").stride())[::-1]
                records.append(
                    CopyRecord(
                        name,
                        shape,
                        0,
                        strides,
                        index,
                        offset,
                        dst if region.transposed else strides,
                    )
                )
                offset += spec.numel
            nbytes = offset * itemsize(region.dtype)
            buffer = self.buffers.setdefault(region.name, torch.zeros(nbytes, dtype=torch.uint8))
            regions.append(
                KernelRegion(
                    region.name, region.dtype, (offset,), nbytes, "direct", buffer.data_ptr()
                )
            )
        used = {record.tensor for record in records}
        skipped = tuple(t.name for t in manifest if t.name not in used)
        scratch = Scratch(self.scratch.data_ptr(), self.scratch.numel())
        return WorkerLayout(self.place, tuple(regions), tuple(records), skipped, scratch)

    def connect(self, ranks: list[p.RankOffer], index: int) -> None:
        self.writes = {
            rank.rank: unpack(rank.writes[index], list[tuple[int, int, int]])
            for rank in ranks
            if rank.writes[index]
        }
        check_writes(self.layout, self.writes)
        for rank in ranks:
            if rank.rank in self.writes:
                self.transport.add_peer(base64.b64decode(rank.metadata))

    def commit(self, epoch: int, version: int, expected: dict[int, list[bytes]]) -> None:
        wanted = {f"ws:{epoch}:{version}:{rank}".encode() for rank in self.writes}
        deadline = time.monotonic() + 5
        while not wanted <= set(self.seen) and time.monotonic() < deadline:
            for messages in self.transport.notifications().values():
                self.seen += messages
        if not wanted <= set(self.seen):
            raise VerifyError(f"no notification of version {version}, only {self.seen}")
        for rank, writes in self.writes.items():
            pieces = [
                self.buffers[self.layout.regions[r].name][offset : offset + nbytes]
                for r, offset, nbytes in writes
            ]
            if digests(pieces) != expected[rank]:
                raise VerifyError(f"digests of rank {rank} differ", hint="push again")

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        return self.buffers[name].view(dtype).view(shape)


@dataclass
class Agent:
    """``before[path]`` and ``after[path]`` run around a call and may raise or sleep."""

    fabric: Fabric
    regions: Callable[[Manifest], list[Region]] = plain_regions
    n_workers: int = 1
    token: str | None = None
    version: int = 0
    make_transport: Callable[[], Transport] | None = None
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    after: dict[str, Callable[[], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = st.AgentState(phase="ready", version=self.version)
        self.calls: list[str] = []
        self.resets: list[bool] = []
        self.times: list[tuple[str, float]] = []
        self.bodies: dict[str, dict[str, Any]] = {}
        self.released: list[p.AbortRequest] = []
        self.connections: set[Any] = set()
        self.generating = True
        self.lock = threading.RLock()
        make = self.make_transport or (lambda: InMemoryTransport(self.fabric, "worker"))
        self.workers = [Worker(make, WorkerPlace(tp=i)) for i in range(self.n_workers)]
        self.server = _serve(self)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    # ---- HTTP

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        if b'"released":' in body:  # what a rank says once its handles are gone
            self.released.append(p.AbortRequest.model_validate_json(body))
            return 200, self._reply().model_dump()
        given = json.loads(body) if body else {}
        try:
            if self.token is not None and token != f"Bearer {self.token}":
                self.calls.append(path)
                raise AuthError("wrong token", hint="set WEIGHTSYNC_TOKEN")
            if method == "GET":
                self._step(path, None)
                s = self.state
                return 200, {
                    "state": s.phase, "version": s.version, "target": s.target,
                    "session": s.session, "epoch": s.epoch, "pause_owner": s.owner,
                }  # fmt: skip
            return 200, self._steps(path, given).model_dump()
        except WeightSyncError as error:
            return error.status, error.to_problem()

    def _steps(self, path: str, given: dict[str, Any]) -> Any:
        """A call, and the one that it may bring along, each as if it came by itself."""
        push = {"push_id": given.get("push_id")}
        if pause := given.get("pause"):
            step = "/pause"
            try:
                self._step(step, push | {"mode": pause})
                step = path
                return self._step(path, given)
            except WeightSyncError as error:
                error.context["step"] = "pause" if step == "/pause" else "begin"
                raise
        reply = self._step(path, given)
        if given.get("resume"):
            with suppress(WeightSyncError):
                return self._step("/resume", push)
        return reply

    def _step(self, path: str, given: dict[str, Any] | None) -> Any:
        self.calls.append(path)
        self.times.append((path, time.perf_counter()))
        if hook := self.before.get(path):
            hook()
        if given is None:
            return None
        self.bodies[path] = given
        with self.lock:
            reply = getattr(self, path.strip("/"))(given)
        if hook := self.after.get(path):
            hook()
        return reply

    def _ask(self, event: Any, then: Callable[[], Any] = lambda: None) -> p.StepResponse:
        """Step, carry out, tell what became of it."""
        self.state, effects = st.step(self.state, event)
        for effect in effects:
            self._carry_out(effect, event, then)
        return self._reply()

    def _carry_out(self, effect: st.Effect, event: Any, then: Callable[[], Any]) -> None:
        outcome: Any = None
        more: tuple[st.Effect, ...] = ()
        if effect is st.Effect.PAUSE:
            self.generating = False
            outcome = Paused(event.push_id)
        elif effect is st.Effect.RESUME:
            self.generating = True
            outcome = Resumed()
        elif effect in {st.Effect.BEGIN, st.Effect.COMMIT}:
            try:
                then()
            except WeightSyncError:
                self.state, more = st.step(self.state, PushFailed(reachable=True))
                for effect_ in more:
                    self._carry_out(effect_, event, then)
                raise
            if effect is st.Effect.COMMIT:
                outcome = Committed(event.version)
        elif effect is st.Effect.ABORT:
            outcome = Aborted(frozenset({self.state.version}), dirty=True)
        if outcome is not None:
            self.state, more = st.step(self.state, outcome)
            for effect_ in more:
                self._carry_out(effect_, event, then)

    def _reply(self) -> p.StepResponse:
        return p.StepResponse(
            state=self.state.phase, version=self.state.version, seconds={"verify": 0.5}
        )

    def init_transfer(self, body: dict[str, Any]) -> p.InitTransferResponse:
        ask = p.InitTransferRequest.model_validate(body)
        manifest = Manifest(unpack(ask.manifest, tuple[TensorSpec, ...]))
        self._ask(InitAsked(ask.session))
        wanted = self.regions(manifest)
        offers = [w.open(manifest, wanted) for w in self.workers]
        self.state = st.step(self.state, SessionOpened(ask.session, self.state.epoch)).state
        return p.InitTransferResponse(
            session=ask.session, epoch=self.state.epoch, version=self.state.version, workers=offers
        )

    def connect(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.ConnectRequest.model_validate(body)
        self._ask(ConnectAsked(ask.session, ask.epoch))
        for index, worker in enumerate(self.workers):
            worker.connect(ask.ranks, index)
        self.state = st.step(self.state, Connected(ask.epoch)).state
        return self._reply()

    def pause(self, body: dict[str, Any]) -> p.StepResponse:
        return self._ask(PauseAsked(p.PauseRequest.model_validate(body).push_id))

    def resume(self, body: dict[str, Any]) -> p.StepResponse:
        return self._ask(ResumeAsked(p.ResumeRequest.model_validate(body).push_id))

    def begin_update(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.BeginRequest.model_validate(body)
        self.resets.append(ask.reset_prefix_cache)
        return self._ask(BeginAsked(ask.session, ask.epoch, ask.push_id, ask.version))

    def commit_update(self, body: dict[str, Any]) -> p.StepResponse:
        ask = p.CommitRequest.model_validate(body)

        def verify() -> None:
            for index, worker in enumerate(self.workers):
                expected = {r.rank: unpack(r.digests[index], list[bytes]) for r in ask.ranks}
                worker.commit(ask.epoch, ask.version, expected)

        return self._ask(CommitAsked(ask.session, ask.epoch, ask.push_id, ask.version), verify)

    def abort_update(self, body: dict[str, Any]) -> p.StepResponse:
        return self._ask(AbortAsked(p.AbortRequest.model_validate(body).push_id))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for worker in self.workers:
            worker.close()


def _serve(agent: Agent) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._do()

        def do_POST(self) -> None:
            self._do()

        def _do(self) -> None:
            agent.connections.add(self.client_address)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization")
            status, answer = agent.answer(self.command, self.path, body, token)
            if status == HANG_UP:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


#: a status that no answer has: the connection is closed without one
HANG_UP = 0


class HangUpError(WeightSyncError):
    """Raised by a hook: the client sees its connection end."""

    status = HANG_UP
