"""A whole stack of real processes, engine and agent, and what a test asks of it.

Every process is ended by its own pid, every wait has a bound.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.torch_host import ROOT, SECRET, free_port, stop
from weightsync.errors import WeightSyncError, from_problem
from weightsync_client import Deadlines, Publisher
from weightsync_client.report import PushReport

TOKEN = "a-token-for-the-tests"
PROMPT = [5, 6, 7, 8]
Weights = dict[str, torch.Tensor]

#: long enough for two busy cores, short enough to see what hangs
QUICK = Deadlines(
    connect_s=2, status_s=5, rendezvous_s=20, pause_s=5, begin_s=5, write_s=5, commit_s=10,
    resume_s=5, abort_s=5, grace_s=1,
)  # fmt: skip


def environ() -> dict[str, str]:
    """What every process of the stack is started with."""
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "WEIGHTSYNC_ENGINE_SECRET": SECRET,
        "OMP_NUM_THREADS": "1",
    }


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Polls ``true``; fails the test with ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(0.02)


class Daemon:
    """A server of the stack: its port stays the same when it is started again."""

    def __init__(
        self,
        module: str,
        options: Sequence[str],
        log: Path,
        *,
        alive: str,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.url = f"http://{host}:{self.port}"
        self.log = log
        self._command = [*prefix, sys.executable, "-m", module, "--port", str(self.port), *options]
        self._alive = alive
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command, env=environ(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def wait_alive(self, timeout_s: float = 60.0) -> None:
        def answers() -> bool:
            if not self.runs:
                raise RuntimeError(f"{self._command} ended:\n{self.log.read_text()[-4000:]}")
            try:
                return httpx.get(self.url + self._alive, timeout=5, trust_env=False).is_success
            except httpx.TransportError:
                return False

        wait_until(answers, f"{self.url}{self._alive} answers", timeout_s)

    def kill(self) -> None:
        """SIGKILL, to this process alone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.runs:
            assert self._process is not None
            self.thaw()
            stop(self._process)


class AtPhase:
    """A publisher's progress that calls a hook, once, at the start of a phase."""

    def __init__(self) -> None:
        self.hooks: dict[str, Callable[[], object]] = {}
        self.phases: list[str] = []

    def started(self, phase: str, version: int) -> None:
        self.phases.append(phase)
        hook = self.hooks.pop(phase, None)
        if hook is not None:
            hook()

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """Nothing."""

    def done(self, report: PushReport) -> None:
        """Nothing."""

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """Nothing."""


def ask_apart(publisher: Publisher) -> None:
    """Have it make the calls that several agents get, though it has one: hooks come in between."""
    publisher._settings = replace(publisher._settings, joined=False)


@dataclass(frozen=True)
class Held:
    """What the engine holds and answers at one moment."""

    version: int
    sha256: dict[str, str]
    answer: dict[str, Any]


@dataclass
class Stack:
    """One engine, one agent, and a trainer in this process.

    Args:
        checkpoint: Of the model that the engine starts with.
        folder: For logs and checkpoints.
        engine: Runs the whole time.
        agent_options: Further options of the agent.
        publisher_options: Further options of the trainer's own publisher.
    """

    checkpoint: Path
    folder: Path
    engine: Daemon
    agent_options: Sequence[str] = ()
    deadlines: Deadlines = QUICK
    publisher_options: Mapping[str, Any] = field(default_factory=dict)
    agent: Daemon = field(init=False)
    progress: AtPhase = field(init=False, default_factory=AtPhase)
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        token_file = self.folder / "token"
        token_file.write_text(TOKEN)
        token_file.chmod(0o600)
        self.agent = new_agent(
            self.engine.url, self.folder / "agent.log", token_file, *self.agent_options
        )
        self.publisher = self.new_publisher(progress=self.progress, **self.publisher_options)
        ask_apart(self.publisher)
        self._http = httpx.Client(
            base_url=self.agent.url,
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=30,
            trust_env=False,
        )
        self._seed = 1000

    def new_publisher(self, **options: Any) -> Publisher:
        given = {"token": TOKEN, "deadlines": self.deadlines, "progress": "off", **options}
        return Publisher([self.agent.url], **given)

    def close(self) -> None:
        self.publisher.close()
        self._http.close()
        self.agent.stop()

    # ------------------------------------------------------------------ the agent

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._http.post(path, json=body)

    def raw_post(self, path: str, content: bytes | Iterator[bytes]) -> httpx.Response:
        return self._http.post(path, content=content)

    def refusal(self, path: str, **body: Any) -> WeightSyncError:
        """The error that the agent answers this POST with."""
        answer = self.post(path, **body)
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        assert answer.status_code == answer.json()["status"]
        return from_problem(answer.json())

    def status(self) -> dict[str, Any]:
        return dict(self.get("/status").json())

    @property
    def state(self) -> str:
        return str(self.status()["state"])

    def wait_for_state(self, state: str, timeout_s: float = 20.0) -> None:
        def there() -> bool:
            try:
                return self.state == state
            except httpx.TransportError:
                return False

        wait_until(there, f"the agent is {state}", timeout_s)

    def wait_until_settled(self, timeout_s: float) -> None:
        """Wait until no push holds the engine, and none that came late takes it."""
        calm = 0

        def settled() -> bool:
            nonlocal calm
            calm = calm + 1 if self.state in ("ready", "torn") else 0
            return calm > 20

        wait_until(settled, "no push holds the engine", timeout_s)

    def last_error(self) -> dict[str, Any]:
        return dict(self.status()["last_errors"][-1])

    @contextlib.contextmanager
    def events(self) -> Iterator[list[dict[str, Any]]]:
        """The agent's server-sent states, as they come in."""
        seen: list[dict[str, Any]] = []

        def read() -> None:
            with contextlib.suppress(httpx.TransportError):
                lines = response.iter_lines()
                seen.extend(json.loads(line[6:]) for line in lines if line.startswith("data: "))

        with self._http.stream("GET", "/events", timeout=60) as response:
            reader = threading.Thread(target=read)
            reader.start()
            try:
                wait_until(lambda: seen, "the event stream begins")
                yield seen
            finally:
                response.extensions["network_stream"].get_extra_info("socket").shutdown(2)
                reader.join(10)

    # ------------------------------------------------------------------ the engine

    def answer(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """What the engine answers to a fixed prompt: token ids and exact log probabilities."""
        body = {"prompt": PROMPT, "max_tokens": 2, "logprobs": 1, "return_token_ids": True}
        url = f"{self.engine.url}/v1/completions"
        answer = httpx.post(url, json=body, timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        return {key: choice[key] for key in ("token_ids", "logprobs")}

    def held(self) -> Held:
        """What the engine holds now; it must be ready."""
        checksums = self.get("/checksums").json()
        return Held(checksums["version"], checksums["sha256"], self.answer())

    # ------------------------------------------------------------------ weights

    def weights(self, seed: int | None = None) -> Weights:
        """New values for every tensor of the model's checkpoint; no seed: never drawn before."""
        self._seed += seed is None
        return drawn_weights(self.checkpoint, self._seed if seed is None else seed)

    def push(self, weights: Mapping[str, torch.Tensor] | None = None) -> PushReport:
        """Push from this process; new weights by default."""
        return self.publisher.push(self.weights() if weights is None else weights)

    def failing_push(
        self, kind: type[BaseException], *, at: str = "", do: Callable[[], object] | None = None
    ) -> Any:
        """A push of new weights that ends in ``kind``, after ``do`` was called at phase ``at``."""
        if do is not None:
            self.progress.hooks[at] = do
        with pytest.raises(kind) as caught:
            self.push()
        assert not self.progress.hooks, f"the push never came to {at}"
        return caught.value

    def slab(self) -> torch.Tensor:
        """The bytes that the push that is running is about to write."""
        session = self.publisher._held.session
        assert session is not None
        return session.slots.slab.data

    # ------------------------------------------------------------------ end states

    def assert_serves(self, held: Held) -> None:
        """The engine is ready and serves exactly what it held then."""
        assert self.state == "ready"
        assert self.get("/readyz").status_code == 200
        assert self.held() == held

    def assert_torn(self) -> None:
        """The engine generates nothing, and agent and engine say so."""
        status = self.status()
        assert status["state"] == "torn"
        gate = self.get("/readyz")
        assert gate.status_code == 503
        assert gate.json()["code"] == "engine_torn"
        refused = self.post("/resume")
        assert refused.status_code == 409
        assert refused.json()["code"] == "engine_torn"
        assert "push again" in refused.json()["hint"]
        with pytest.raises(httpx.ReadTimeout):
            self.answer(timeout_s=0.3)

    def assert_holds(self, weights: Weights, version: int) -> None:
        """The engine serves what an engine that loads these weights from disk would."""
        folder = self.folder / f"saved-{version}"
        ready = self.get(f"/readyz?min_version={version}")
        assert ready.status_code == 200, ready.text
        status = self.status()
        assert (status["state"], status["version"]) == ("ready", version)
        assert not any(w["dirty"] for w in status["workers"])
        assert self.held().sha256 == fresh_checksums(weights, self.checkpoint, folder)

    def assert_a_whole_push_works(self) -> None:
        """New weights are pushed, and the engine then serves them, all of them."""
        weights = self.weights()
        report = self.push(weights)
        self.assert_holds(weights, report.version)
        last = self.status()["last_push"]
        assert (last["push_id"], last["outcome"]) == (report.push_id, "committed")

    def heal(self) -> None:
        """Whatever a test before left behind, the next one starts from ready."""
        self.progress.hooks.clear()
        for daemon in (self.engine, self.agent):
            if daemon.runs:
                daemon.thaw()
            else:
                daemon.start()
        self.engine.wait_alive()
        self.agent.wait_alive()
        wait_until(lambda: self.state != "detached", "the agent has joined the engine", 30)
        if self.state in ("paused", "receiving"):
            owner = self.status()["pause_owner"]
            self.post("/resume") if owner is None else self.post(
                "/abort_update", session="s", push_id=owner
            )
        if self.state != "ready":
            self.push()
        self.wait_for_state("ready")


def drawn_weights(checkpoint: Path, seed: int) -> Weights:
    """Random values for every tensor of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(checkpoint / "model.safetensors")
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor.normal_(0.0, 0.08, generator=generator)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return tensors


def new_agent(engine_url: str, log: Path, token_file: Path, *options: str) -> Daemon:
    """An agent that looks often and gives up early; not yet started."""
    given = ["--engine-url", engine_url, "--token-file", str(token_file)]
    given += ["--engine-poll-s", "0.2", "--attach-backoff-max-s", "1"]
    given += ["--journal", str(log.with_suffix(".journal"))]
    return Daemon("weightsync_server.agent.cli", [*given, *options], log, alive="/healthz")


def new_engine(checkpoint: Path, log: Path) -> Daemon:
    """A torch engine; not yet started."""
    module = "weightsync_server.engines.torch_host"
    return Daemon(module, ["--model", str(checkpoint)], log, alive="/health")


def save(weights: Weights, like: Path, folder: Path) -> Path:
    """Save a trainer's weights as a checkpoint with the config of another."""
    folder.mkdir(exist_ok=True)
    for config in like.glob("*.json"):
        (folder / config.name).write_bytes(config.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fresh_checksums(weights: Weights, like: Path, folder: Path) -> dict[str, str]:
    """SHA-256 of every kernel tensor of an engine that loads these weights from disk."""
    from weightsync_server.engines.torch_engine import TorchAdapter
    from weightsync_server.receiver.endpoint import nixl_transport
    from weightsync_server.receiver.receiver import Receiver

    adapter = TorchAdapter(save(weights, like, folder))
    return Receiver(adapter, nixl_transport).checksums().sha256
