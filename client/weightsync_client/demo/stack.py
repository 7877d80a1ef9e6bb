"""Engines and the agents beside them, as the demo starts them."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from weightsync.errors import EngineError
from weightsync_client.demo.agent import DemoAgent
from weightsync_client.demo.ask import CONTEXT_TOKENS, PROBE_TOKENS, Answer, complete
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Process, Processes, end_all

_ANSWER_S = 300.0
#: ``engine0/dp0/pp0/tp0/ep0``
_PLACE_PARTS = 5
# whole CUDA graphs, whose replays must see the new weights, without the minute of a compilation
_CUDA_OPTIONS = (
    *("--compilation-config", '{"mode": 0, "cudagraph_mode": "FULL"}'),
    *("--kv-cache-memory-bytes", str(1 << 30)),
)


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
        *(_cuda_options(options) if options.cuda else ("--enforce-eager",)),
        *("--max-model-len", str(context), "--tensor-parallel-size", str(options.tp)),
        *("--pipeline-parallel-size", str(options.pp), "--data-parallel-size", str(options.dp)),
        *(("--enable-expert-parallel",) if options.expert_parallel else ()),
    ]


def _cuda_options(options: DemoOptions) -> tuple[str, ...]:
    # replicas may have to share a GPU
    share = 0.5 if options.replicas == 1 else 0.7 / options.replicas
    return (*_CUDA_OPTIONS, "--gpu-memory-utilization", f"{share:.2f}")


def engine_environ(options: DemoOptions, replica: int = 0) -> dict[str, str]:
    """What an engine sees beside :func:`shared_environ`."""
    if options.engine == "torch":
        return {}
    if options.cuda:
        first = options.trainer_ranks + replica * options.workers
        return {"VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": _gpus_from(first)}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        **({} if options.packed else {"WEIGHTSYNC_VLLM_CPU_PLAIN": "1"}),
    }


def _gpus_from(first: int) -> str:
    """All GPUs, so that peers can be mapped, from that one on; those before it come last.

    Trainer ranks keep to the first ones, and engines take what follows, round and round.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = sum(1 for path in Path("/dev").glob("nvidia[0-9]*"))
        gpus = [str(k) for k in range(count)]
    else:
        gpus = visible.split(",")
    start = first % len(gpus) if gpus else 0
    return ",".join([*gpus[start:], *gpus[:start]])


def context_tokens(max_positions: int | None) -> int:
    """Tokens that prompt and answer may have together."""
    return CONTEXT_TOKENS if max_positions is None else min(CONTEXT_TOKENS, max_positions)


class Stack:
    """Engines and their agents.  Agents listen from the start, engines once they are told to.

    Args:
        name: In logs and messages.
        options: The demo's.
        processes: Starts them.
        deadline: Of every wait.
        replicas: How many engines.
    """

    def __init__(
        self,
        name: str,
        options: DemoOptions,
        processes: Processes,
        deadline: Deadline,
        replicas: int = 1,
    ) -> None:
        numbers = [""] if replicas == 1 else [f" {k}" for k in range(replicas)]
        self._names = [f"{name} engine{number}" for number in numbers]
        self._options = options
        self._processes = processes
        self._deadline = deadline
        self._ports = [processes.reserve_port() for _ in numbers]
        self.engine_urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._agents = [
            DemoAgent(f"{name} agent{number}", processes, deadline)
            for number in ([""] if options.one_agent else numbers)
        ]
        self._engines: list[Process] = []

    @property
    def agent_urls(self) -> list[str]:
        """Where the agents listen."""
        return [agent.url for agent in self._agents]

    def start(self, model: Path, context: int) -> None:
        """Start every engine on a checkpoint, and the agents."""
        for k, (name, port) in enumerate(zip(self._names, self._ports, strict=True)):
            command = engine_command(self._options, model, port, context)
            environ = engine_environ(self._options, k)
            self._engines.append(self._processes.start(name, command, environ))
        each = len(self.engine_urls) // len(self._agents)
        for k, agent in enumerate(self._agents):
            agent.start(self.engine_urls[k * each : (k + 1) * each])

    def wait_ready(self) -> list[dict[str, Any]]:
        """Wait until every agent's admission gate opens; the agents' statuses then.

        Raises:
            EngineError: A process ended.
            RefusedError, TraceError, ManifestError: An engine cannot be attached to with the
                checkpoint that it serves.
            DeadlineError: The demo is out of time.
        """
        return [agent.wait_ready(self._engines) for agent in self._agents]

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """What each engine generates, greedily, for each prompt, one after the other.

        Raises:
            EngineError: One does not answer as it should; with the end of its log, if it is over.
        """
        return [
            answer
            for url, process in zip(self.engine_urls, self._engines, strict=True)
            for answer in self._answers(url, process, prompts)
        ]

    def _answers(
        self, url: str, process: Process, prompts: Sequence[Sequence[int]]
    ) -> list[Answer]:
        # a proxy is for the internet, not for the loopback interface
        with httpx.Client(base_url=url, trust_env=False) as http:
            try:
                return [
                    complete(
                        http,
                        prompt,
                        max_tokens=PROBE_TOKENS,
                        timeout_s=min(_ANSWER_S, self._deadline.left_s("an answer")),
                    )
                    for prompt in prompts
                ]
            except EngineError:
                process.check()
                raise

    def is_ready(self) -> bool:
        """Whether every admission gate is open now."""
        return all(agent.is_ready() for agent in self._agents)

    def checksums(self) -> list[dict[str, str]]:
        """Of each engine the SHA-256 of every final kernel tensor, by name.

        Raises:
            WeightSyncError: What an agent answers instead.
        """
        each = len(self.engine_urls) // len(self._agents)
        return [own for agent in self._agents for own in _by_engine(agent.checksums(), each)]

    def stop(self) -> None:
        """End all.  The agents first, so that they do not report a lost engine."""
        end_all([*(a.process for a in self._agents if a.process is not None), *self._engines])


def _by_engine(sums: dict[str, str], engines: int) -> list[dict[str, str]]:
    """An agent's checksums as the agents of its engines would tell them, had each one."""
    if engines == 1:
        return [sums]
    found: list[dict[str, str]] = []
    for engine in range(engines):
        mine = {
            tuple(name.split("/", _PLACE_PARTS)): digest
            for name, digest in sums.items()
            if name.startswith(f"engine{engine}/")
        }
        # a lone worker's place is left out, and a lone engine is engine 0
        alone = len({place[:_PLACE_PARTS] for place in mine}) == 1
        found.append(
            {
                parts[-1] if alone else "/".join(("engine0", *parts[1:])): digest
                for parts, digest in mine.items()
            }
        )
    return found
