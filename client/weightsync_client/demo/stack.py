"""An engine and the agent beside it, as the demo starts them."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from weightsync.errors import (
    DeadlineError,
    EngineError,
    ManifestError,
    RefusedError,
    TraceError,
    WeightSyncError,
    from_problem,
)
from weightsync_client.demo.ask import CONTEXT_TOKENS, PROBE_TOKENS, Answer, complete
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Process, Processes, end_all, free_port

_POLL_S = 0.1
_CALL_S = 300.0
_LOCAL = "http://127.0.0.1"
# whole CUDA graphs, whose replays must see the new weights, without the minute of a compilation
_CUDA_OPTIONS = (
    *("--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL"}'),
    *("--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", str(1 << 30)),
)
# asking again changes nothing about these
_HOPELESS = {TraceError.code, RefusedError.code, ManifestError.code}


def shared_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What all processes of the demo see: the caller's environment, less what would change it."""
    mine = {
        name: value
        for name, value in environ.items()
        if not name.startswith("WEIGHTSYNC_") and name != "VLLM_SERVER_DEV_MODE"
    }
    return mine | {
        "WEIGHTSYNC_ENGINE_SECRET": secrets.token_urlsafe(32),
        # the processes share a few cores, and the model may be tiny
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def engine_command(options: DemoOptions, model: Path, port: int, context: int) -> list[str]:
    """The command line of the engine's server.

    Args:
        options: The demo's.
        model: Checkpoint to load.
        port: To listen on.
        context: Tokens of prompt and answer together.
    """
    place = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    if options.engine == "torch":
        device = "cuda" if options.cuda else "cpu"
        return [
            *(sys.executable, "-m", "weightsync_server.engines.torch_host"),
            *(*place, "--device", device),
        ]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", *place),
        *("--worker-extension-cls", "weightsync_server.worker.WeightsyncWorker"),
        *("--middleware", "weightsync_server.middleware.WeightsyncMiddleware"),
        *("--skip-tokenizer-init", "--dtype", "bfloat16"),
        *(_CUDA_OPTIONS if options.cuda else ("--enforce-eager",)),
        *("--max-model-len", str(context), "--tensor-parallel-size", str(options.tp)),
    ]


def engine_environ(options: DemoOptions) -> dict[str, str]:
    """What the engine sees beside :func:`shared_environ`."""
    if options.engine == "torch":
        return {}
    if options.cuda:
        # the trainer keeps to the first GPU; all are visible, so that peers can be mapped
        return {"VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": _engine_gpus()}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **({} if options.packed else {"WEIGHTSYNC_VLLM_CPU_PLAIN": "1"}),
    }


def _engine_gpus() -> str:
    """All GPUs, the trainer's (the first) last."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = sum(1 for path in Path("/dev").glob("nvidia[0-9]*"))
        gpus = [str(k) for k in range(count)]
    else:
        gpus = visible.split(",")
    return ",".join([*gpus[1:], gpus[0]]) if gpus else ""


def context_tokens(max_positions: int | None) -> int:
    """Tokens that prompt and answer may have together."""
    return CONTEXT_TOKENS if max_positions is None else min(CONTEXT_TOKENS, max_positions)


class Stack:
    """One engine with its agent.  The agent listens from the start, the engine once it is told to.

    Args:
        name: In logs and messages.
        options: The demo's.
        processes: Starts them.
        deadline: Of every wait.
    """

    def __init__(
        self, name: str, options: DemoOptions, processes: Processes, deadline: Deadline
    ) -> None:
        self._name = name
        self._options = options
        self._processes = processes
        self._deadline = deadline
        self._engine_port, self._agent_port = free_port(), free_port()
        self.engine_url = f"{_LOCAL}:{self._engine_port}"
        self.agent_url = f"{_LOCAL}:{self._agent_port}"
        self._started: list[Process] = []

    def start(self, model: Path, context: int) -> None:
        """Start the engine on a checkpoint, and the agent."""
        command = engine_command(self._options, model, self._engine_port, context)
        environ = engine_environ(self._options)
        start = self._processes.start
        self._started.append(start(f"{self._name} engine", command, environ))
        agent = [sys.executable, "-m", "weightsync_server.agent.cli"]
        agent += ["--engine-url", self.engine_url, "--port", str(self._agent_port)]
        # it finds the engine soon after that is up
        agent += ["--engine-poll-s", "0.25", "--attach-backoff-max-s", "1"]
        self._started.append(start(f"{self._name} agent", agent))

    def wait_ready(self) -> dict[str, Any]:
        """Wait until the agent's admission gate opens; the agent's status then.

        Raises:
            EngineError: A process ended.
            RefusedError, TraceError, ManifestError: The engine cannot be attached to with the
                checkpoint that it serves.
            DeadlineError: The demo is out of time.
        """
        with self._http(self.agent_url) as http:
            while True:
                for process in self._started:
                    process.check()
                left_s = min(5.0, self._deadline.left_s(f"the {self._name} engine and its agent"))
                try:
                    ready = http.get("/readyz", timeout=left_s).status_code == 200
                    status: dict[str, Any] = http.get("/status", timeout=left_s).json()
                except httpx.HTTPError:
                    time.sleep(_POLL_S)
                    continue
                if ready:
                    return status
                errors = status.get("last_errors", [])
                if errors and errors[-1]["code"] in _HOPELESS:
                    raise self._attach_error(http)
                time.sleep(_POLL_S)

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """What the engine generates, greedily, for each prompt, one after the other.

        Raises:
            EngineError: It does not answer as it should; with the end of its log, if it is over.
        """
        with self._http(self.engine_url) as http:
            try:
                return [
                    complete(http, p, max_tokens=PROBE_TOKENS, timeout_s=self._call_s("an answer"))
                    for p in prompts
                ]
            except EngineError:
                self._started[0].check()
                raise

    def is_ready(self) -> bool:
        """Whether the admission gate is open now."""
        with self._http(self.agent_url) as http:
            return http.get("/readyz", timeout=self._call_s("/readyz")).status_code == 200

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every final kernel tensor, by name.

        Raises:
            WeightSyncError: What the agent answers instead.
        """
        answer = self._agent_call("GET", "/checksums")
        return {str(k): str(v) for k, v in answer["sha256"].items()}

    def stop(self) -> None:
        """End both.  The agent first, so that it does not report a lost engine."""
        end_all(self._started[::-1])

    def _attach_error(self, http: httpx.Client) -> WeightSyncError:
        """What keeps the agent from attaching, as the workers put it."""
        answer = http.post("/attach", json={}, timeout=self._call_s("/attach"))
        problem = answer.json()
        return from_problem(problem)

    def _agent_call(self, method: str, path: str) -> dict[str, Any]:
        timeout_s = self._call_s(path)
        with self._http(self.agent_url) as http:
            try:
                response = http.request(method, path, timeout=timeout_s)
            except httpx.TimeoutException as error:
                raise DeadlineError(
                    f"the {self._name} agent did not answer {path} in {timeout_s:g} s"
                ) from error
            except httpx.HTTPError as error:
                raise EngineError(f"the {self._name} agent's {path} failed: {error!r}") from error
        answer: dict[str, Any] = response.json()
        if response.status_code != 200:
            raise from_problem(answer)
        return answer

    def _call_s(self, what: str) -> float:
        return min(_CALL_S, self._deadline.left_s(what))

    def _http(self, url: str) -> httpx.Client:
        # a proxy is for the internet, not for the loopback interface
        return httpx.Client(base_url=url, trust_env=False)
