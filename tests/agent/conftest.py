"""A running agent and its fake engine, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
import uvicorn.server
from pydantic import SecretStr

from weightsync.codec import pack
from weightsync.protocol import PROTOCOL_VERSION
from weightsync_server.agent.app import Agent
from weightsync_server.agent.cli import AgentServer, listen
from weightsync_server.agent.settings import AgentSettings


def _load_fake_engine():
    # --import-mode=importlib leaves a test folder off sys.path
    name = "weightsync_tests_fake_engine"
    if name not in sys.modules:
        path = Path(__file__).with_name("fake_engine.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


fake = _load_fake_engine()


class Brisk:
    """The asyncio of uvicorn, which sleeps 0.1 s whenever it shuts down: after every test here."""

    def __getattr__(self, name: str):
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


@pytest.fixture(autouse=True)
def _brisk_servers(monkeypatch):
    monkeypatch.setattr(uvicorn.server, "asyncio", Brisk())


class QuietAgentServer(AgentServer, fake.QuietServer):
    """The agent's server without signal handlers."""


class RunningAgent:
    """An agent, its server and a client to it."""

    def __init__(self, agent: Agent, running, headers) -> None:
        self.agent = agent
        self.running = running
        self.url = running.url
        self.http = httpx.AsyncClient(
            base_url=running.url, trust_env=False, timeout=20, headers=headers
        )

    async def stop(self) -> None:
        await self.http.aclose()
        await self.running.stop()

    async def post(self, path: str, *, expect: int = 200, **body):
        response = await self.http.post(path, json=body)
        answer = response.json()
        assert response.status_code == expect, answer
        if expect >= 400:
            assert response.headers["content-type"] == "application/problem+json"
            assert set(answer) == {
                "type", "title", "status", "detail", "code", "hint", "context"
            }  # fmt: skip
            assert answer["status"] == expect
        return answer

    async def refused(self, path: str, status: int, code: str, **body):
        answer = await self.post(path, expect=status, **body)
        assert answer["code"] == code, answer
        return answer

    async def status(self):
        return (await self.http.get("/status")).json()

    async def until(self, state: str, timeout_s: float = 8.0):
        """The status as soon as the agent is in that state."""
        async with asyncio.timeout(timeout_s):
            while (status := await self.status())["state"] != state:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return status

    async def ready_code(self) -> int:
        return (await self.http.get("/readyz")).status_code


class Trainer:
    """The calls of one push, in order."""

    def __init__(self, agent: RunningAgent, session: str = "s1", push_id: str = "p1") -> None:
        self.agent = agent
        self.session = session
        self.push_id = push_id
        self.epoch = 0
        self.workers = 1

    @property
    def step(self):
        return {"session": self.session, "epoch": self.epoch, "push_id": self.push_id}

    def manifest(self):
        return {"tensors": [{"name": "a", "dtype": "float32", "shape": [4]}]}

    async def init(self, **more):
        answer = await self.agent.post(
            "/init_transfer",
            protocol_version=PROTOCOL_VERSION,
            session=self.session,
            manifest=self.manifest(),
            **more,
        )
        self.epoch, self.workers = answer["epoch"], len(answer["workers"])
        return answer

    def ranks(self, field: str, record):
        return [{"rank": 0, field: [pack(record)] * self.workers}]

    async def connect(self, expect: int = 200):
        ranks = [{**self.ranks("writes", [(0, 0, 16), (1, 0, 8)])[0], "metadata": "bWV0YQ=="}]
        return await self.agent.post(
            "/connect", expect=expect, session=self.session, epoch=self.epoch, ranks=ranks
        )

    async def rendezvous(self):
        await self.init()
        await self.connect()
        return self

    async def pause(self, expect: int = 200, **more):
        return await self.agent.post("/pause", expect=expect, push_id=self.push_id, **more)

    async def begin(self, version: int, expect: int = 200, **more):
        body = self.step | {"version": version} | more
        return await self.agent.post("/begin_update", expect=expect, **body)

    async def commit(self, version: int, expect: int = 200, **more):
        ranks = self.ranks("digests", [b"d" * 16, b"e" * 16])
        body = self.step | {"version": version, "ranks": ranks} | more
        return await self.agent.post("/commit_update", expect=expect, **body)

    async def abort(self, expect: int = 200):
        return await self.agent.post(
            "/abort_update", expect=expect, session=self.session, push_id=self.push_id, reason="x"
        )

    async def resume(self, expect: int = 200):
        return await self.agent.post("/resume", expect=expect, push_id=self.push_id)

    async def push(self, version: int):
        await self.pause()
        await self.begin(version)
        await self.commit(version)
        return await self.resume()


@pytest.fixture(scope="session")
def fakes():
    """The module of the fake engine."""
    return fake


@pytest.fixture
def trainer():
    return Trainer


@pytest_asyncio.fixture
async def make_engine():
    made = []

    async def make(workers: int = 1):
        made.append(await fake.FakeEngine(workers).start())
        return made[-1]

    yield make
    for engine in made:
        await engine.stop()


@pytest_asyncio.fixture
async def engine(make_engine):
    return await make_engine()


@pytest_asyncio.fixture
async def make_agent(tmp_path):
    made = []

    async def make(engine_url: str, *, wait: str | None = "ready", token=None, **options):
        options = {"journal": tmp_path / f"{len(made)}.journal"} | options
        settings = AgentSettings(
            engine_url=engine_url,
            token=None if token is None else SecretStr(token),
            **{
                "port": 0,
                "engine_poll_s": 0.05,
                "engine_probe_timeout_s": 1.0,
                "shutdown_timeout_s": 1,
            }
            | options,
        )
        agent = Agent(settings, fake.SECRET)
        sock = listen(settings)
        agent.listens_at(*sock.getsockname())
        running = await fake.Running(QuietAgentServer(agent), sock).started()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        made.append(RunningAgent(agent, running, headers))
        if wait is not None:
            await made[-1].until(wait)
        return made[-1]

    yield make
    for agent in made:
        await agent.stop()


@pytest_asyncio.fixture
async def agent(make_agent, engine):
    return await make_agent(engine.url)
