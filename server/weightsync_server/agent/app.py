"""The agent's HTTP API.  Handlers translate, nothing more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

import weightsync
from weightsync.errors import (
    EngineDetachedError,
    EngineSyncingError,
    EngineTornError,
    StaleVersionError,
    StateError,
)
from weightsync.protocol import (
    PROTOCOL_VERSION,
    SESSION_SECRET_HEADER,
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
    Seconds,
    StepResponse,
    VerifyRequest,
    VerifyResponse,
    Version,
    WorkerReply,
)
from weightsync_server.agent import problems
from weightsync_server.agent.aside import aside
from weightsync_server.agent.auth import REPLY_PATH, Gate
from weightsync_server.agent.calls import Calls
from weightsync_server.agent.door import Door, Handler
from weightsync_server.agent.engine_client import EngineClient
from weightsync_server.agent.engines import Engines
from weightsync_server.agent.events import EventHub
from weightsync_server.agent.journal import default_path
from weightsync_server.agent.metrics import Metrics
from weightsync_server.agent.openapi import RESPONSES, describing
from weightsync_server.agent.pages import add_page
from weightsync_server.agent.replies import Replies
from weightsync_server.agent.service import Service
from weightsync_server.agent.settings import AgentSettings
from weightsync_server.agent.status import JournalStatus, StatusResponse
from weightsync_server.agent.tokens import Tokens
from weightsync_server.agent.watch import Watch
from weightsync_server.agent.workers import ShadowTerms

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=BaseModel)


class Health(BaseModel):
    """Answer to the probes."""

    status: str
    version: int | None = None


class ChecksumsResponse(BaseModel):
    """Answer to ``GET /checksums``."""

    version: int
    sha256: dict[str, str]


class Agent:
    """Everything of one agent; ``app`` is its ASGI app, the rest lives as long as that runs.

    Args:
        settings: What it was told.
        secret: Shared with the engine.
    """

    def __init__(self, settings: AgentSettings, secret: str) -> None:
        self.settings = settings
        self.started = time.monotonic()
        self.replies = Replies()
        self.hub = EventHub()
        self.metrics = Metrics()
        self.engines = Engines(
            [
                EngineClient(
                    number,
                    url,
                    secret,
                    self.replies,
                    max_unpacked_nbytes=settings.max_unpacked_nbytes,
                )
                for number, url in enumerate(settings.engine_url)
            ],
            self.replies,
        )
        self.service = Service(
            self.engines,
            self.hub,
            self.metrics,
            settings.journal or default_path(settings.engine_url),
            engine_timeout_s=settings.engine_timeout_s,
            shadow=ShadowTerms(
                settings.shadow_device, settings.max_shadow_nbytes, settings.require_shadow
            ),
        )
        self.metrics.journal_writable.set_function(lambda: not self.service.journal.trouble)
        self.calls = Calls(
            self.service,
            engine_timeout_s=settings.engine_timeout_s,
            max_unpacked_nbytes=settings.max_unpacked_nbytes,
        )
        self._recalled = False
        self._posts: dict[str, Handler] = {}
        self.app = self._make_app(secret)

    def listens_at(self, host: str, port: int) -> None:
        """Tell where the agent can be reached, before it starts: workers send answers there."""
        # one that listens everywhere is reached over loopback
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        name = f"[{host}]" if ":" in host else host
        for client in self.engines.clients:
            client.reply_url = f"http://{name}:{port}{REPLY_PATH}"

    def recall(self) -> None:
        """Read the journal, before the first call.  Safe to call twice.

        Raises:
            InputError: Another agent has it.
        """
        if not self._recalled:
            self._recalled = True
            self.service.recall()
            self.calls.recall(self.service.journal.record)

    def status(self) -> StatusResponse:
        """What ``GET /status`` tells."""
        service, state = self.service, self.service.state
        journal = service.journal
        return StatusResponse(
            state=state.phase,
            version=state.version,
            target=state.target,
            committed=state.committed,
            committed_by=state.committed_by,
            lowest=state.lowest,
            epoch=state.epoch,
            session=state.session,
            connected=state.connected,
            pause_owner=state.owner,
            syncing=self._syncing,
            engines=service.workers.engines,
            workers=service.workers.status,
            last_push=service.clock.last,
            recent_pushes=list(service.clock.recent),
            last_errors=list(service.errors),
            journal=JournalStatus(path=str(journal.path), trouble=journal.trouble),
            rollback_to=state.rollback_to,
            rolled_back_from=state.rolled_back_from,
            uptime_s=round(time.monotonic() - self.started, 3),
            protocol_version=PROTOCOL_VERSION,
            weightsync_version=weightsync.__version__,
        )

    @property
    def _syncing(self) -> bool:
        """Whether the first push since the engine's start is still to come, and waited for."""
        return self.settings.require_push and not self.service.state.version

    def check_ready(self, min_version: int) -> Health:
        """The admission gate.

        Raises:
            StateError: The engine serves no whole version, or one that is too old.
        """
        state = self.service.state
        if state.phase == "detached":
            last = self.service.errors[-1].detail if self.service.errors else "not yet attached"
            raise EngineDetachedError(f"the agent has no engine: {last}", hint="see /status")
        if state.phase == "torn":
            raise EngineTornError("the engine's weights are not whole", hint="push again")
        if state.phase not in ("ready", "shadowing"):
            raise StateError(f"the engine is {state.phase}", hint="wait for the push to end")
        if state.version < min_version:
            raise StaleVersionError(
                f"the engine serves version {state.version}, not {min_version}",
                hint="wait for the push of that version",
            )
        if self._syncing:
            raise EngineSyncingError(
                "the engine serves what it was started with, and no push has come yet",
                hint="wait for the first whole push",
            )
        return Health(status="ready", version=state.version)

    def _make_app(self, secret: str) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            self.recall()
            watch = asyncio.create_task(Watch(self.service, self.settings).run())
            try:
                yield
            finally:
                self.hub.close()
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)
                await self.calls.stop()
                await self.service.journal.flush()
                self.service.journal.close()
                await self.engines.aclose()

        app = FastAPI(
            title="weightsync agent",
            version=weightsync.__version__,
            description="Carries new weights into the engine beside it, whole or not at all.",
            lifespan=lifespan,
            responses=RESPONSES,
        )
        app.add_middleware(Door, posts=self._posts, count=self._count_error)
        app.add_middleware(
            Gate,
            tokens=Tokens.of(self.settings),
            secret=secret,
            max_body_nbytes=self.settings.max_body_nbytes,
            count=self._count_error,
        )
        problems.install(app, self._count_error)
        self._add_gets(app)
        self._add_posts(app)
        add_page(app)
        return app

    def _count_error(self, path: str, code: str) -> None:
        known = any(getattr(route, "path", None) == path for route in self.app.routes)
        # whoever guesses paths must not make time series
        self.metrics.call_errors.labels(path if known else "other", code).inc()

    def _add_gets(self, app: FastAPI) -> None:
        @app.get("/healthz")
        async def healthz() -> Health:
            """The daemon lives."""
            return Health(status="ok")

        @app.get("/readyz")
        async def readyz(min_version: Version = 0) -> Response:
            """200 only when the engine serves a whole, committed version; else 503."""
            try:
                ready = self.check_ready(min_version)
            except StateError as error:
                response = problems.problem_response(error, status=503)
                response.headers["Retry-After"] = "1"
                return response
            return Response(ready.model_dump_json(), media_type="application/json")

        @app.get("/status")
        async def status() -> StatusResponse:
            """State, version, epoch, workers, engine, last push."""
            return self.status()

        @app.get("/checksums")
        async def checksums(
            timeout_s: Annotated[Seconds, Query()] = 300.0,
        ) -> ChecksumsResponse:
            """SHA-256 of every final kernel tensor, made by the workers now."""
            version, sha256 = await self.calls.checksums(timeout_s)
            return ChecksumsResponse(version=version, sha256=sha256)

        @app.get("/metrics", response_class=Response)
        async def metrics() -> Response:
            """For Prometheus."""
            return Response(self.metrics.render(), media_type=self.metrics.content_type)

        @app.get("/events", response_class=StreamingResponse)
        async def events(
            last_event_id: Annotated[int | None, Header(ge=0)] = None,
        ) -> StreamingResponse:
            """Server-sent events: every change of state, the present one first."""
            stream = self.hub.stream(
                self.service.snapshot(),
                last_id=last_event_id,
                heartbeat_s=self.settings.heartbeat_s,
            )
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )

    def _add_posts(self, app: FastAPI) -> None:
        calls = self.calls
        guard = self.service.guard
        schemas: dict[str, Any] = {}

        def post(
            path: str, kind: type[M], answer: type[R], call: Callable[[M], Awaitable[R]]
        ) -> None:
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}) | {kind.__name__: schema})
            reference = {"$ref": f"#/components/schemas/{kind.__name__}"}

            @app.post(
                path,
                name=path.strip("/").replace("/", "_"),
                description=call.__doc__,
                openapi_extra={
                    "requestBody": {"content": {"application/json": {"schema": reference}}}
                },
                include_in_schema=path != REPLY_PATH,
                response_model=answer,
            )
            async def handle(request: Request) -> Response:
                message = await parsed(kind, await request.body())
                secret = request.headers.get(SESSION_SECRET_HEADER)
                guard.check(message, secret, open_session=self.service.state.session)
                made = await call(message)
                return Response(made.model_dump_json(), media_type="application/json")

            self._posts[path] = handle

        post("/attach", AttachRequest, StepResponse, calls.attach)
        post("/pause", PauseRequest, StepResponse, calls.pause)
        post("/resume", ResumeRequest, StepResponse, calls.resume)
        post("/init_transfer", InitTransferRequest, InitTransferResponse, calls.init_transfer)
        post("/connect", ConnectRequest, StepResponse, calls.connect)
        post("/begin_update", BeginRequest, StepResponse, calls.begin)
        post("/prepare_commit", PrepareRequest, StepResponse, calls.prepare)
        post("/commit_update", CommitRequest, StepResponse, calls.commit)
        post("/abort_update", AbortRequest, StepResponse, calls.abort)
        post("/rollback", RollbackRequest, StepResponse, calls.rollback)
        post("/reload", ReloadRequest, StepResponse, calls.reload)
        post("/verify", VerifyRequest, VerifyResponse, calls.verify)

        async def reply(message: WorkerReply) -> Health:
            """A worker's answer."""
            self.replies.deliver(message)
            return Health(status="taken")

        post(REPLY_PATH, WorkerReply, Health, reply)

        app.openapi = describing(app, schemas)  # type: ignore[method-assign]


async def parsed(kind: type[M], raw: bytes) -> M:
    """A body as a message; an empty one has every default.

    Raises:
        InputError: It is not one; names each place that is wrong.
    """
    try:
        return await aside(len(raw), kind.model_validate_json, raw or b"{}")
    except ValidationError as error:
        raise problems.invalid_input(error) from error
