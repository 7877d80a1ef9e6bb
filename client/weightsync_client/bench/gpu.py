"""``weightsync bench gpu``: pushes between GPUs into real vLLM, and the same bytes by other means.

A trainer on the first GPU, vLLM on the second one, or on the same where there is only one.  Every
case stands alone: one that fails is noted with its reason, and the others go on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from weightsync.errors import InputError, WeightSyncError
from weightsync_client.bench import models
from weightsync_client.bench.baselines import Baselines, VllmNccl
from weightsync_client.bench.engine import Engine
from weightsync_client.bench.figures import Case, Figures, run_rounds
from weightsync_client.bench.gpu_targets import judge
from weightsync_client.bench.loopback import push_seconds
from weightsync_client.bench.part import Part
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.stack import engine_environ

CaseName = Literal["dense", "expandable", "cpu", "moe", "vllm_nccl"]
CASES: tuple[CaseName, ...] = ("dense", "expandable", "cpu", "moe", "vllm_nccl")
#: what a case other than ``dense`` keeps of a push
_KEPT = ("push", "write", "paused", "paused_beyond_write", "fill", "commit")
_ALONE = "NCCL needs a GPU for each process"
_START_S = 240.0
_MAKE_S = 120.0
_SWEEP_NBYTES = _ALONE_NBYTES = 4 << 30
_SWEEP_REPEATS = 5


class GpuOptions(BaseModel):
    """One run of ``bench gpu``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: Annotated[int, Field(ge=2, le=1000)] = 10
    """Pushes of each case that count."""
    warmup: Annotated[int, Field(ge=1, le=100)] = 2
    """Pushes before them.  The first is proven through the engine's own loader."""
    cases: Annotated[tuple[CaseName, ...], Field(min_length=1)] = CASES
    """What is measured."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 450.0
    """Seconds for the whole benchmark (WS-6)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """``cpu`` runs the same cases with tiny models and the embedded engine: a test of this file."""


def run_gpu(
    options: GpuOptions,
    folder: Path,
    environ: Mapping[str, str],
    told: Callable[[str], None],
) -> Figures:
    """Measure every case.  ``bench-gpu.json`` in the folder holds what is known, case by case.

    Every process is ended when this returns or raises.

    Args:
        options: What, and how often.
        folder: For the figures, configs and logs.
        environ: What the processes see.
        told: Is told what runs.

    Raises:
        InputError: There is no GPU.
    """
    figures = Figures("gpu", facts={"rounds": options.rounds, "warmup": options.warmup})
    figures.facts["gpus"] = _gpus() if options.device == "cuda" else []
    if options.device == "cuda" and not figures.facts["gpus"]:
        raise InputError(
            "there is no CUDA device here", hint="weightsync bench loopback needs none"
        )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    deadline = Deadline(options.timeout_s, "benchmark")
    with Processes(folder / "logs", environ) as processes:
        _Gpu(options, folder, processes, deadline, told, figures).run()
    return figures


class _Gpu:
    def __init__(
        self,
        options: GpuOptions,
        folder: Path,
        processes: Processes,
        deadline: Deadline,
        told: Callable[[str], None],
        figures: Figures,
    ) -> None:
        self._options = options
        self._folder = folder
        self._processes = processes
        self._deadline = deadline
        self._told = told
        self._figures = figures
        self._cuda = options.device == "cuda"
        self._device = "cuda:0" if self._cuda else "cpu"
        self._kind = DemoOptions(engine="vllm" if self._cuda else "torch", device=options.device)
        self._baselines: Baselines | None = None
        self._made: dict[str, Any] = {}
        self._dense_made: dict[str, Any] = {}

    def run(self) -> None:
        cases = self._options.cases
        dense = self._config("dense", models.qwen3_8b())
        # All engines load at the same time, before anything is measured.
        engine = self._engine("dense", dense) if {"dense", "expandable", "cpu"} & {*cases} else None
        experts = self._config("moe", models.many_experts()) if "moe" in cases else None
        moe = self._engine("moe", experts) if experts else None
        nccl = None
        if "vllm_nccl" in cases and len(self._figures.facts["gpus"]) < 2:
            self._figures.failed["vllm_nccl"] = _ALONE
        elif "vllm_nccl" in cases:
            nccl = VllmNccl(
                self._processes, self._deadline, dense.parent, engine_environ(self._kind)
            )
        self._told("engines are starting")
        for name, one in (("dense", engine), ("moe", moe)):
            if one is not None:
                with self._case(name):
                    self._figures.facts["engine"] = one.wait_ready()
        if nccl is not None:
            with self._case("vllm_nccl"):
                nccl.wait_loaded(_START_S)
        if engine is not None and "dense" not in self._figures.failed:
            if "dense" in cases:
                self._dense(engine, dense)
            self._others(engine, dense)
            engine.stop()
        if moe is not None and experts is not None and "moe" not in self._figures.failed:
            self._moe(moe, experts)
        if nccl is not None and "vllm_nccl" not in self._figures.failed:
            with self._case("vllm_nccl"):
                self._nccl(nccl)
        with self._case("targets"):
            judge(self._figures)

    def _dense(self, engine: Engine, config: Path) -> None:
        """Pushes and all that moves the same bytes, in turn."""
        with self._case("dense"), self._trainer("trainer", config) as trainer:
            self._dense_made = self._made
            nbytes = int(self._made["nbytes"])
            self._figures.facts |= {"nbytes": nbytes, "tensors": len(self._made["shapes"])}
            cases: dict[str, Case] = {"push": lambda: _push(trainer, engine)}
            self._rounds(cases | self._baseline_cases(nbytes), nbytes)
            if self._baselines is not None and "raw_nixl_write" not in self._figures.failed:
                with self._case("descriptors"):
                    most = min(nbytes, _SWEEP_NBYTES)
                    self._figures.descriptors = self._baselines.sweep(most, _SWEEP_REPEATS)

    def _baseline_cases(self, nbytes: int) -> dict[str, Case]:
        """What two processes that only move bytes can do here."""
        target = engine_environ(self._kind)
        pair = Baselines(self._processes, self._deadline, self._device, ({}, target))
        self._baselines = pair
        cases: dict[str, Case] = {}
        if self._cuda:
            cases["device_copy"] = lambda: {"device_copy": self._copy(pair, nbytes)}
        with self._case("raw_nixl_write"):
            pair.open_raw(nbytes)
            cases["raw_nixl_write"] = lambda: {"raw_nixl_write": pair.write_raw()}
        name = "nccl_broadcast" if self._cuda else "gloo_broadcast"
        if self._cuda and len(self._figures.facts["gpus"]) < 2:
            self._figures.failed[name] = _ALONE
            return cases
        with self._case(name):
            pair.join("nccl" if self._cuda else "gloo", self._made["shapes"])
            cases[name] = lambda: {name: pair.broadcast()}
        return cases

    def _others(self, engine: Engine, config: Path) -> None:
        """The same engine, other trainers."""
        if "expandable" in self._options.cases:
            setting = "expandable_segments:True"
            names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
            environ = dict.fromkeys(names, setting) if self._cuda else {}
            with self._case("expandable"), self._trainer("expandable", config, environ) as trainer:
                self._pushes("expandable", trainer, engine)
        if "cpu" in self._options.cases:
            facts = {"blocking_sync": True}
            with self._case("cpu"), self._trainer("cpu", config, facts=facts) as trainer:
                kept = ("trainer_cpu_thread", "trainer_cpu_process")
                self._pushes("cpu", trainer, engine, kept, copies=False)

    def _moe(self, engine: Engine, config: Path) -> None:
        with self._case("moe"), self._trainer("moe", config) as trainer:
            self._figures.facts["moe_nbytes"] = int(self._made["nbytes"])
            self._figures.facts["moe_tensors"] = len(self._made["shapes"])
            self._pushes("moe", trainer, engine)
        engine.stop()

    def _nccl(self, nccl: VllmNccl) -> None:
        """VLLM's own transfer of the dense model."""
        made = self._dense_made
        if not made:
            with self._trainer("manifest", self._folder / "dense" / "config.json"):
                made = self._made
        nccl.join(made["names"], made["shapes"])
        self._rounds(
            {
                "vllm_nccl_packed": lambda: {"vllm_nccl_packed": nccl.transfer(packed=True)},
                "vllm_nccl_unpacked": lambda: {"vllm_nccl_unpacked": nccl.transfer(packed=False)},
            },
            int(made["nbytes"]),
        )
        nccl.finish()

    def _pushes(
        self,
        case: str,
        trainer: Part,
        engine: Engine,
        kept: tuple[str, ...] = _KEPT,
        *,
        copies: bool = True,
    ) -> None:
        """Pushes of another trainer, and copies of the same bytes between them."""
        nbytes = int(self._made["nbytes"])
        pair = self._baselines

        def push() -> dict[str, float]:
            seconds = _push(trainer, engine)
            return {f"{case}_{name}": seconds[name] for name in kept}

        cases: dict[str, Case] = {f"{case}_push": push}
        if copies and pair is not None and self._cuda:
            cases[f"{case}_device_copy"] = lambda: {f"{case}_device_copy": pair.copy_device(nbytes)}
        self._rounds(cases, nbytes, essential=f"{case}_push")

    def _copy(self, pair: Baselines, nbytes: int) -> float:
        """Seconds of copying that many bytes; scaled from fewer where one GPU must hold both."""
        copied = nbytes if len(self._figures.facts["gpus"]) > 1 else min(nbytes, _ALONE_NBYTES)
        return pair.copy_device(copied) * nbytes / copied

    def _rounds(self, cases: Mapping[str, Case], nbytes: int, essential: str = "push") -> None:
        moved = (
            "push", "write", "fill", "commit", "device_copy", "raw_nixl_write", "nccl_broadcast",
            "gloo_broadcast", "vllm_nccl_packed", "vllm_nccl_unpacked",
        )  # fmt: skip
        names = dict.fromkeys(moved, nbytes)
        names |= {f"{c}_{name}": nbytes for c in ("expandable", "moe") for name in moved}
        run_rounds(
            self._figures,
            cases,
            rounds=self._options.rounds,
            warmup=self._options.warmup,
            nbytes=names,
            essential=(essential,),
            told=self._told,
        )

    def _config(self, name: str, config: dict[str, Any]) -> Path:
        if not self._cuda:
            config = models.shrunk(config)
        return models.write_config(self._folder / name, config)

    def _engine(self, name: str, config: Path) -> Engine:
        model = config.parent
        if not self._cuda:  # the embedded engine loads a checkpoint
            model = self._folder / f"{name}-v0"
            with self._trainer(f"{name} checkpoint", config, facts={"checkpoint": str(model)}):
                pass
        return Engine(name, self._kind, model, self._processes, self._deadline, dummy=self._cuda)

    @contextmanager
    def _trainer(
        self,
        name: str,
        config: Path,
        environ: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Iterator[Part]:
        """A trainer that has made its model; it lets go of its memory at the end."""
        command = [sys.executable, "-m", "weightsync_client.bench.trainer"]
        command += [str(config), self._device]
        trainer = Part(self._processes, name, command, self._deadline, environ)
        try:
            self._made = trainer.ask("make", timeout_s=_MAKE_S, **(facts or {}))
            yield trainer
            trainer.ask("close", timeout_s=_MAKE_S)
        finally:
            trainer.finish()

    @contextmanager
    def _case(self, name: str) -> Iterator[None]:
        """Note what a case fails with, and write down what is known by then."""
        self._told(name)
        try:
            yield
        except WeightSyncError as error:
            self._figures.failed.setdefault(name, str(error))
        finally:
            text = json.dumps(self._figures.to_dict(), indent=1)
            (self._folder / "bench-gpu.json").write_text(text + "\n")


def _push(trainer: Part, engine: Engine) -> dict[str, float]:
    seconds = push_seconds(trainer, engine)
    return seconds | {"paused_beyond_write": seconds["paused"] - seconds["write"]}


def _gpus() -> list[str]:
    """Names of the CUDA devices."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
