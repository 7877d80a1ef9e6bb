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
from typing import Any

from weightsync.errors import InputError, WeightSyncError
from weightsync_client.bench import models
from weightsync_client.bench.baselines import Baselines, VllmNccl
from weightsync_client.bench.engine import Engine
from weightsync_client.bench.figures import Case, Figures, run_rounds
from weightsync_client.bench.gpu_options import GpuOptions
from weightsync_client.bench.gpu_targets import judge
from weightsync_client.bench.loopback import push_seconds
from weightsync_client.bench.part import Job, Part
from weightsync_client.bench.prediction import predict
from weightsync_client.demo.link import torchrun_environ
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.demo.stack import engine_environ

#: what a case other than ``dense`` keeps of a push
_KEPT = ("push", "write", "longest_write", "paused", "paused_beyond_write", "fill", "commit")
_ALONE = "NCCL needs a GPU for each process"
_SPLIT = 2
_FEW = "two trainer ranks and two workers need four GPUs"
_START_S = 240.0
_MAKE_S = 120.0
_SWEEP_NBYTES = _ALONE_NBYTES = 4 << 30
_SWEEP_REPEATS = 5


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
        cases, figures = self._options.cases, self._figures
        dense = self._config("dense", models.qwen3_8b())
        experts = self._config("moe", models.many_experts())
        if len(figures.facts["gpus"]) < 2 and "vllm_nccl" in cases:
            figures.failed["vllm_nccl"] = _ALONE
        if self._cuda and len(figures.facts["gpus"]) < 2 * _SPLIT and "split" in cases:
            figures.failed["split"] = _FEW
        # All engines load at the same time, before anything is measured.
        engines: dict[str, Engine] = {}
        if {"dense", "expandable", "slots", "cpu", "shadow"} & {*cases}:
            engines["dense"] = self._engine("dense", dense)
        if "moe" in cases:
            engines["moe"] = self._engine("moe", experts)
        if "fp8" in cases:
            served = self._config("fp8", models.as_fp8(models.qwen3_8b()))
            engines["fp8"] = self._engine("fp8", served if self._cuda else dense, fp8=True)
        if "split" in cases and "split" not in figures.failed:
            engines["split"] = self._engine("split", dense, workers=_SPLIT if self._cuda else 1)
        nccl = None
        if "vllm_nccl" in cases and "vllm_nccl" not in figures.failed:
            nccl = VllmNccl(
                self._processes, self._deadline, dense.parent, engine_environ(self._kind)
            )
        self._told("engines are starting")
        for name, one in engines.items():
            with self._case(name):
                figures.facts["engine"] = one.wait_ready()
        if nccl is not None:
            with self._case("vllm_nccl"):
                nccl.wait_loaded(_START_S)
        measures = {
            "dense": self._of_dense, "moe": self._moe, "fp8": self._fp8, "split": self._split
        }  # fmt: skip
        for name, one in engines.items():
            if name not in figures.failed:
                measures[name](one, experts if name == "moe" else dense)
            one.stop()
        if nccl is not None and "vllm_nccl" not in figures.failed:
            with self._case("vllm_nccl"):
                self._nccl(nccl)
        with self._case("targets"):
            judge(figures)

    def _of_dense(self, engine: Engine, config: Path) -> None:
        """Everything that pushes into the one engine of the dense model."""
        if "dense" in self._options.cases:
            self._dense(engine, config)
        self._others(engine, config)

    def _dense(self, engine: Engine, config: Path) -> None:
        """Pushes and all that moves the same bytes, in turn."""
        with self._case("dense"), self._trainer("trainer", config) as trainer:
            self._dense_made = self._made
            nbytes = int(self._made["nbytes"])
            self._figures.facts |= {"nbytes": nbytes, "tensors": len(self._made["shapes"])}
            cases: dict[str, Case] = {"push": lambda: _push(trainer, engine)}
            cases["scan"] = lambda: trainer.ask("scan", timeout_s=_MAKE_S, nbytes=nbytes)
            self._rounds(cases | self._baseline_cases(nbytes), nbytes)
            if self._baselines is not None and "raw_nixl_write" not in self._figures.failed:
                with self._case("descriptors"):
                    most = min(nbytes, _SWEEP_NBYTES)
                    self._figures.descriptors = self._baselines.sweep(most, _SWEEP_REPEATS)
            link = "device_copy" if "device_copy" in self._figures.series else "raw_nixl_write"
            if self._figures.descriptors and "scan" in self._figures.series:
                predict(self._figures, trainer, link)

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
        if "slots" in self._options.cases:
            copied = {"zero_copy_bytes": 0}
            with self._case("slots"), self._trainer("slots", config, facts=copied) as trainer:
                self._pushes("slots", trainer, engine)
        if "cpu" in self._options.cases:
            with self._case("cpu"), self._trainer("cpu", config) as trainer:
                kept = ("trainer_cpu_thread", "trainer_cpu_process")
                self._pushes("cpu", trainer, engine, kept, beside={})
        if "shadow" in self._options.cases:
            aside = {"mode": "shadow"}
            with self._case("shadow"), self._trainer("shadow", config, facts=aside) as trainer:
                parts = (*_KEPT, "prepare", "begin", "pause", "resume", "commit_install")
                self._pushes("shadow", trainer, engine, parts, beside={})

    def _moe(self, engine: Engine, config: Path) -> None:
        with self._case("moe"), self._trainer("moe", config) as trainer:
            self._figures.facts["moe_nbytes"] = int(self._made["nbytes"])
            self._figures.facts["moe_tensors"] = len(self._made["shapes"])
            self._pushes("moe", trainer, engine)

    def _fp8(self, engine: Engine, config: Path) -> None:
        """A bfloat16 trainer that quantises as it fills, and copies within its memory."""
        copied = _SWEEP_NBYTES if self._cuda else 1 << 20
        with self._case("fp8"), self._trainer("fp8", config, facts={"fp8": True}) as trainer:
            sent = int(self._made["published_nbytes"])
            # every value is read once and every byte of the wire is written once
            moved = {
                "fp8_fill": int(self._made["nbytes"]) + sent,
                "fp8_write": sent,
                "fp8_local_copy": 2 * copied,
            }

            def copy() -> dict[str, float]:
                return {
                    "fp8_local_copy": trainer.ask("copy", timeout_s=_MAKE_S, nbytes=copied)["copy"]
                }

            self._pushes("fp8", trainer, engine, beside={"fp8_local_copy": copy}, moved=moved)

    def _split(self, engine: Engine, config: Path) -> None:
        """FSDP2 ranks, each with a GPU, and an engine with as many workers."""
        with self._case("split"), self._trainer("split", config, ranks=_SPLIT) as trainer:
            moved = {"split_write": int(self._made["nbytes"])}
            self._pushes("split", trainer, engine, beside={}, moved=moved)

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
        trainer: Job,
        engine: Engine,
        kept: tuple[str, ...] = _KEPT,
        *,
        beside: Mapping[str, Case] | None = None,
        moved: Mapping[str, int] | None = None,
    ) -> None:
        """Pushes of another trainer, and what runs beside them: copies of the same bytes, if None.

        ``moved``: bytes of series, where they are not those of the model.
        """
        nbytes = int(self._made["nbytes"])
        pair = self._baselines

        def push() -> dict[str, float]:
            seconds = _push(trainer, engine)
            return {f"{case}_{name}": seconds[name] for name in kept}

        cases: dict[str, Case] = {f"{case}_push": push, **(beside or {})}
        if beside is None and pair is not None and self._cuda:
            cases[f"{case}_device_copy"] = lambda: {f"{case}_device_copy": pair.copy_device(nbytes)}
        self._rounds(cases, nbytes, essential=f"{case}_push", moved=moved)

    def _copy(self, pair: Baselines, nbytes: int) -> float:
        """Seconds of copying that many bytes; scaled from fewer where one GPU must hold both."""
        copied = nbytes if len(self._figures.facts["gpus"]) > 1 else min(nbytes, _ALONE_NBYTES)
        return pair.copy_device(copied) * nbytes / copied

    def _rounds(
        self,
        cases: Mapping[str, Case],
        nbytes: int,
        essential: str = "push",
        moved: Mapping[str, int] | None = None,
    ) -> None:
        moving = (
            "push", "write", "fill", "scan", "commit", "device_copy", "raw_nixl_write",
            "nccl_broadcast",
            "gloo_broadcast", "vllm_nccl_packed", "vllm_nccl_unpacked",
        )  # fmt: skip
        names = dict.fromkeys(moving, nbytes)
        names |= {f"{c}_{name}": nbytes for c in ("expandable", "slots", "moe") for name in moving}
        names |= moved or {}
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

    def _engine(self, name: str, config: Path, *, fp8: bool = False, workers: int = 1) -> Engine:
        model = config.parent
        if not self._cuda:  # the embedded engine loads a checkpoint
            model = self._folder / f"{name}-v0"
            facts = {"checkpoint": str(model), "fp8": fp8}
            with self._trainer(f"{name} checkpoint", config, facts=facts):
                pass
        kind = self._kind.model_copy(update={"tp": workers, "trainer_ranks": workers})
        return Engine(name, kind, model, self._processes, self._deadline, dummy=self._cuda)

    @contextmanager
    def _trainer(
        self,
        name: str,
        config: Path,
        environ: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
        ranks: int = 1,
    ) -> Iterator[Job]:
        """A trainer that has made its model; it lets go of its memory at the end."""
        command = [sys.executable, "-m", "weightsync_client.bench.trainer"]
        command += [str(config), self._device]
        port = self._processes.reserve_port() if ranks > 1 else 0
        trainer = Job(
            [
                Part(
                    self._processes,
                    name if rank == 0 else f"{name} rank {rank}",
                    command,
                    self._deadline,
                    {**(environ or {}), **(torchrun_environ(rank, ranks, port) if port else {})},
                )
                for rank in range(ranks)
            ]
        )
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


def _push(trainer: Job, engine: Engine) -> dict[str, float]:
    seconds = push_seconds(trainer, engine)
    return seconds | {"paused_beyond_write": seconds["paused"] - seconds["write"]}


def _gpus() -> list[str]:
    """Names of the CUDA devices."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
