"""Real vLLM whose processes are killed in a push, or that is torn: what it serves afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from tests.support.cli import invoke
from tests.support.models import make_model
from tests.support.stack import AtPhase, wait_until
from weightsync.errors import EngineError, TransportError, WeightSyncError
from weightsync.transport.nixl import NixlTransport
from weightsync_client import Deadlines, Publisher
from weightsync_client.demo import stack as demo_stack
from weightsync_client.demo.ask import make_prompts
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes, end_all
from weightsync_client.demo.stack import Stack, engine_command, engine_environ, shared_environ
from weightsync_server.secret import ENV, HEADER

pytestmark = [pytest.mark.nixl, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
CONTEXT = 128
#: what a dead engine may cost the trainer
QUICK = Deadlines(write_s=10, begin_s=10, commit_s=20, abort_s=10)
#: ``vllm serve``, whose own entry wants a distribution of that name: the one for CPU has another
SERVE = """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser, command = FlexibleArgumentParser(), ServeSubcommand()
command.subparser_init(parser.add_subparsers(dest="subparser"))
command.cmd(parser.parse_args())
"""


class Vllm:
    """One vLLM, its agent, and a trainer in this process."""

    def __init__(self, options: DemoOptions, processes: Processes, folder: Path) -> None:
        self.models = [make_model("qwen3", folder / f"m{k}", seed=k) for k in range(3)]
        self._options = options
        self._processes = processes
        self.progress = AtPhase()
        self.stack = Stack("one", options, processes, Deadline(350))
        self.stack.start(self.models[0], CONTEXT)
        (self.status,) = self.stack.wait_ready()
        self.publisher = Publisher(
            self.stack.agent_urls, deadlines=QUICK, progress=self.progress, mode="direct"
        )

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.stack.agent_urls[0] + path, trust_env=False, timeout=30)

    @property
    def state(self) -> str:
        return str(self.get("/status").json()["state"])

    def push(self, model: int) -> int:
        return self.publisher.push(load_file(self.models[model] / "model.safetensors")).version

    def held(self) -> tuple[object, object]:
        """What it holds and answers."""
        return self.stack.checksums(), self.stack.answers(make_prompts(512))

    def start_again(self, model: int) -> None:
        """Another server at the same address, with that checkpoint."""
        end_all(self.stack._engines)
        command = engine_command(self._options, self.models[model], self.stack._ports[0], CONTEXT)
        environ = engine_environ(self._options)
        self.stack._engines[:] = [self._processes.start("again", command, environ)]
        (self.status,) = self.stack.wait_ready()


@contextlib.contextmanager
def running(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: int) -> Iterator[Vllm]:
    folders = [ROOT, ROOT / "server", ROOT / "client", os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    environ = shared_environ(os.environ)
    monkeypatch.setenv(ENV, environ[ENV])
    with Processes(folder, environ) as processes:
        vllm = Vllm(DemoOptions(**options), processes, folder)
        try:
            yield vllm
        finally:
            vllm.publisher.close()
            vllm.stack.stop()


@pytest.mark.parametrize(
    ("moment", "tp"),
    [("begin", 1), ("mid-write", 2)],
    ids=["engine core, paused", "worker, in mid-write"],
)
def test_a_killed_process_of_vllm_serves_nothing_and_its_successor_takes_a_whole_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, tp: int
) -> None:
    with running(tmp_path, monkeypatch, tp=tp) as vllm:
        first = vllm.held()
        assert vllm.push(1) == 1
        second = vllm.held()
        epoch = vllm.get("/status").json()["epoch"]
        # one worker lives in the engine core's process, of several each has its own
        pid = vllm.status["workers"][-1]["pid"]
        assert pid != vllm.stack._engines[0].popen.pid

        def kill(*_: object) -> None:
            os.kill(pid, signal.SIGKILL)

        started = time.monotonic()
        with monkeypatch.context() as patch:
            if moment == "mid-write":
                post = NixlTransport.post
                patch.setattr(NixlTransport, "post", lambda *given: (kill(), post(*given)))
            else:
                vllm.progress.hooks[moment] = kill
            with pytest.raises(WeightSyncError) as caught:
                vllm.push(2)
        assert time.monotonic() - started < 60, caught.value
        wait_until(lambda: vllm.state in ("detached", "torn"), "the agent has noticed", 60)
        assert vllm.get("/readyz").status_code == 503
        with pytest.raises(EngineError):
            vllm.stack.answers([[1, 2]])

        vllm.start_again(1)
        assert vllm.held() == second  # what the push left is what a fresh load makes
        assert vllm.push(0) > 1
        assert vllm.held() == first
        assert vllm.get("/status").json()["epoch"] > epoch


def test_a_torn_vllm_serves_its_checkpoint_again_after_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, monkeypatch) as vllm:
        first = vllm.held()
        agent = vllm.stack.agent_urls
        whole = invoke("reload", *agent)
        assert whole.code == 0, whole.err
        assert vllm.held() == first
        vllm.push(1)
        second = vllm.held()
        post = NixlTransport.post

        def half(*given: object) -> None:
            post(*given)  # type: ignore[arg-type]
            raise TransportError("the cable is out", hint="put it in")

        with monkeypatch.context() as patch:
            patch.setattr(NixlTransport, "post", half)
            with pytest.raises(TransportError):
                vllm.push(2)
        status = vllm.get("/status").json()
        # what only buffers were written for is whole
        assert status["state"] == ("torn" if status["workers"][0]["direct"] else "ready")
        done = invoke("reload", *agent)
        assert done.code == 0, done.err
        assert "ready, version 0" in done.out
        assert vllm.held() == first
        vllm.push(1)
        assert vllm.held() == second


def test_two_api_servers_of_vllm_take_a_push_and_count_its_pauses_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_servers(options: DemoOptions, model: Path, port: int, context: int) -> list[str]:
        python, _, _, *rest = engine_command(options, model, port, context)
        return [python, "-c", SERVE, "serve", str(model), *rest[2:], "--api-server-count", "2"]

    monkeypatch.setattr(demo_stack, "engine_command", two_servers)
    with running(tmp_path, monkeypatch) as vllm:
        url = f"{vllm.stack.engine_urls[0]}/weightsync/"
        headers = {HEADER: os.environ[ENV]}

        def ask(name: str, **body: str) -> dict[str, object]:
            # a connection of its own: the kernel chooses a process for each
            with httpx.Client(trust_env=False, timeout=30, headers=headers) as http:
                answer = http.post(url + name, json=body) if body else http.get(url + name)
                return dict(answer.json())

        servers = {ask("info")["instance"] for _ in range(30)}
        assert len(servers) == 2
        turns = [str(ask("is_paused")["turn"]).rpartition(":") for _ in range(10)]
        assert len({engine for engine, _, _ in turns}) == 1
        counts = [int(count) for _, _, count in turns]
        assert counts == list(range(counts[0], counts[0] + 10))
        late = str(ask("is_paused")["turn"])
        vllm.progress.hooks["commit"] = lambda: refused.extend(
            ask("resume", turn=late).get("code") for _ in range(8)
        )
        refused: list[object] = []
        first = vllm.held()
        vllm.push(1)
        assert refused == ["illegal_state"] * 8
        assert vllm.held() != first
        vllm.push(0)
        assert vllm.held() == first
