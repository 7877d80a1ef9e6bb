"""``weightsync bench loopback``: a push between two processes of this machine, on its CPU."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from weightsync.errors import WeightSyncError
from weightsync.transport.nixl_request import copying_threads
from weightsync_client.bench import models
from weightsync_client.bench.baselines import Baselines
from weightsync_client.bench.engine import Engine
from weightsync_client.bench.figures import Case, Figures, Target, run_rounds
from weightsync_client.bench.part import Job, Part
from weightsync_client.bench.prediction import predict, targets
from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.processes import Deadline, Processes
from weightsync_client.report import PHASES

_START_S = 120.0
_CALL_S = 60.0
_PUSH_S = 180.0
_SWEEP_REPEATS = 3
#: the series of raw NIXL writes by as many threads as copy in a push
_THREADS = "raw_nixl_write_threads"
_MEMORY = Path("/dev/shm")  # noqa: S108  a fresh folder in it


class LoopbackOptions(BaseModel):
    """One run of ``bench loopback``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nbytes: Annotated[int, Field(ge=1_000_000, le=64_000_000_000)] = 256_000_000
    """Bytes of the model, about: it has whole layers."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 20
    """Rounds that count; every case runs once in each."""
    warmup: Annotated[int, Field(ge=1, le=100)] = 2
    """Rounds before those of each set.  The first push makes the rendezvous."""
    sets: Annotated[int, Field(ge=1, le=100)] = 5
    """Sets of processes that share the rounds out: two that write to each other keep the rate that
    the places of their pages gave them."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 600.0
    """Seconds for the whole benchmark (WS-6)."""
    small_pushes: Annotated[int, Field(ge=0, le=1000)] = 40
    """Pushes of as many tensors as an 8B model has, all small, for what Python costs; 0: none."""


def run_loopback(
    options: LoopbackOptions,
    folder: Path,
    environ: Mapping[str, str],
    told: Callable[[str], None],
) -> Figures:
    """Measure pushes into the embedded torch engine, and the same bytes by other means.

    Every process is ended when this returns or raises.

    Args:
        options: How much and how often.
        folder: For checkpoints and logs.
        environ: What the processes see.
        told: Is told what runs.

    Raises:
        WeightSyncError: The pushes failed; a baseline that fails is noted instead.
    """
    (folder / "logs").mkdir(parents=True)
    deadline = Deadline(options.timeout_s, "benchmark")
    with (
        _scratch(options.nbytes) as scratch,
        Processes(folder / "logs", environ) as processes,
    ):
        return _Loopback(options, folder, processes, deadline, told, scratch or folder).run()


@contextmanager
def _scratch(nbytes: int) -> Iterator[Path | None]:
    """A folder in memory for the file of the baseline, which no disk shall slow down."""
    with ExitStack() as owned:
        folder = None
        if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 * nbytes:
            made = tempfile.TemporaryDirectory(prefix="weightsync-bench-", dir=_MEMORY)
            folder = Path(owned.enter_context(made))
        yield folder


class _Loopback:
    def __init__(
        self,
        options: LoopbackOptions,
        folder: Path,
        processes: Processes,
        deadline: Deadline,
        told: Callable[[str], None],
        scratch: Path,
    ) -> None:
        self._options = options
        self._folder = folder
        self._processes = processes
        self._deadline = deadline
        self._told = told
        self._scratch = scratch
        self._figures = Figures("loopback")

    def run(self) -> Figures:
        options, figures = self._options, self._figures
        sets = min(options.sets, options.rounds)
        figures.facts = {"rounds": options.rounds, "warmup": options.warmup, "sets": sets}
        for number in range(sets):
            rounds = len(range(number, options.rounds, sets))
            self._set(number + 1, rounds, last=number + 1 == sets)
        write_s, cpu_s = figures.median("write"), figures.median("trainer_cpu_write")
        if write_s and cpu_s is not None:
            figures.facts["cpu"] = {"write_cpu_s_per_s": cpu_s / write_s}
        if options.small_pushes:
            self._told("many small tensors")
            self._works("python", self._python)
        judge(figures)
        return figures

    def _set(self, number: int, rounds: int, *, last: bool) -> None:
        """So many rounds of a set of processes; the last set does what is measured once, too."""
        options, figures = self._options, self._figures
        model, config = self._folder / "v0", models.dense(options.nbytes)
        config_file = models.write_config(self._folder / "config", config)
        self._told(f"set {number}: making a model, and starting an engine on it")
        trainer = self._start("trainer", "weightsync_client.bench.trainer", str(config_file), "cpu")
        baselines = Baselines(self._processes, self._deadline, "cpu")
        facts = {} if model.exists() else {"checkpoint": str(model)}
        made = trainer.ask("make", timeout_s=_START_S, **facts)
        nbytes = int(made["nbytes"])
        kind = DemoOptions(engine="torch")
        engine = Engine(f"bench {number}", kind, model, self._processes, self._deadline)
        reload = self._start("reload", "weightsync_server.engines.torch_reload", str(model))
        figures.facts |= {"nbytes": nbytes, "tensors": len(made["shapes"])}
        figures.facts["engine"] = engine.wait_ready()
        cases: dict[str, Case] = {"push": lambda: push_seconds(trainer, engine)}
        if self._works("raw_nixl_write", lambda: baselines.open_raw(nbytes)):
            cases["raw_nixl_write"] = lambda: {"raw_nixl_write": baselines.write_raw()}
        threads = copying_threads()
        if threads > 1 and self._works(_THREADS, lambda: baselines.open_raw(nbytes, threads)):
            cases[_THREADS] = lambda: {_THREADS: baselines.write_raw(threads, sleeping=True)}
        if self._works("gloo_broadcast", lambda: baselines.join("gloo", made["shapes"])):
            cases["gloo_broadcast"] = lambda: {"gloo_broadcast": baselines.broadcast()}
        cases["scan"] = lambda: trainer.ask("scan", timeout_s=_CALL_S, nbytes=nbytes)
        cases["safetensors"] = lambda: self._save_and_reload(trainer, reload)
        run_rounds(
            figures,
            cases,
            rounds=rounds,
            warmup=options.warmup,
            nbytes=dict.fromkeys(BYTES_MOVED, nbytes),
            essential=("push",),
            told=self._told,
        )
        if last and "raw_nixl_write" not in figures.failed:
            self._told("writes in pieces of several sizes")
            self._works("descriptors", lambda: self._sweep(baselines))
        if last and figures.descriptors:
            figures.notes.append("The raw writes in pieces wait as a push does, without a spin.")
            link = _THREADS if _THREADS in figures.series else "raw_nixl_write"
            self._works("prediction", lambda: predict(figures, trainer, link))
        if last:
            figures.notes.append(
                "The file of the safetensors baseline lies in memory: no disk slows it."
                if self._scratch != self._folder
                else f"The file of the safetensors baseline lies in {self._scratch.parent}."
            )
        for part in (trainer, reload):
            part.finish()
        baselines.finish()
        engine.stop()

    def _start(self, name: str, module: str, *arguments: str) -> Part:
        command = [sys.executable, "-m", module, *arguments]
        return Part(self._processes, name, command, self._deadline)

    def _works(self, case: str, work: Callable[[], None]) -> bool:
        """Do what a case needs; where that fails the case is noted as failed."""
        try:
            work()
        except WeightSyncError as error:
            self._figures.failed[case] = str(error)
            return False
        return True

    def _sweep(self, baselines: Baselines) -> None:
        self._figures.descriptors = baselines.sweep(self._options.nbytes, _SWEEP_REPEATS)

    def _python(self) -> None:
        """CPU seconds of the pushing thread where there are hardly bytes to move."""
        config = models.shrunk(models.qwen3_8b(), layers=36)
        config_file = models.write_config(self._folder / "small-config", config)
        model, count = self._folder / "small", self._options.small_pushes
        trainer = self._start(
            "small trainer", "weightsync_client.bench.trainer", str(config_file), "cpu"
        )
        made = trainer.ask("make", timeout_s=_START_S, checkpoint=str(model))
        kind = DemoOptions(engine="torch")
        engine = Engine("small", kind, model, self._processes, self._deadline)
        engine.wait_ready()
        seconds = [push_seconds(trainer, engine)["trainer_cpu_thread"] for _ in range(count + 2)]
        trainer.finish()
        engine.stop()
        seconds = seconds[2:]  # the first makes the rendezvous
        part = max(count // 4, 1)
        self._figures.facts.setdefault("cpu", {}).update(
            tensors=len(made["names"]),
            python_s_per_push=statistics.median(seconds),
            first=f"1 to {part}",
            python_s_first=statistics.median(seconds[:part]),
            last=f"{count - part + 1} to {count}",
            python_s_last=statistics.median(seconds[-part:]),
        )

    def _save_and_reload(self, trainer: Part, reload: Part) -> dict[str, float]:
        path = str(self._scratch / "pushed.safetensors")
        saved = trainer.ask("save", timeout_s=_CALL_S, path=path)
        loaded = reload.ask("reload", timeout_s=_CALL_S, path=path)
        seconds = {**saved, **loaded}
        return {**seconds, "safetensors_save_and_reload": sum(seconds.values())}


#: series whose rate means something
BYTES_MOVED = (
    "push", "paused", "write", "fill", "commit", "raw_nixl_write", _THREADS,
    "scan", "gloo_broadcast",
    "safetensors_save", "safetensors_reload", "safetensors_save_and_reload",
)  # fmt: skip


def push_seconds(trainer: Part | Job, engine: Engine) -> dict[str, float]:
    """Change every weight and push once: seconds of the whole, of each phase, and of the CPU."""
    report = trainer.ask("push", timeout_s=_PUSH_S, agents=engine.agents)
    return report_seconds(report)


def report_seconds(report: Mapping[str, Any]) -> dict[str, float]:
    """The series that one push adds to, out of what the trainer answers."""
    return {
        "push": report["total_s"],
        "paused": report["paused_s"],
        **{
            phase: report[f"{phase}_s"]
            for phase in PHASES
            if phase not in ("rendezvous", "prepare")
        },
        **({"prepare": report["prepare_s"]} if report["prepare_s"] else {}),
        "longest_write": report["longest_write_s"],
        **{f"commit_{part}": s for part, s in slowest_parts(report).items()},
        "trainer_cpu_write": report["cpu_write_s"],
        "trainer_cpu_thread": report["cpu_thread_s"],
        "trainer_cpu_process": report["cpu_process_s"],
    }


def slowest_parts(report: Mapping[str, Any]) -> dict[str, float]:
    """What the agents measured in commit, by part: of the slowest agent."""
    parts: dict[str, float] = {}
    for agent in report["agents"]:
        for part, seconds in agent["seconds"].items():
            name = part.removesuffix("_s")
            parts[name] = max(parts.get(name, 0.0), seconds)
    return parts


def judge(figures: Figures) -> None:
    """Compute the ratios and hold them to the targets."""
    theirs = {
        "raw_nixl": ("raw_nixl_write", "a raw NIXL write in one descriptor", 0.9),
        "gloo_broadcast": ("gloo_broadcast", "a gloo broadcast of the same tensors", 1.0),
        "safetensors_reload": (
            "safetensors_save_and_reload", "safetensors, saved and loaded by the engine", 1.0
        ),
    }  # fmt: skip
    for ours, name in (("write", "write"), ("push", "whole push")):
        for short, (series, text, goal) in theirs.items():
            if ours == "push" and short == "raw_nixl":
                continue
            ratio = figures.set_ratio(f"{ours}_vs_{short}", ours, series)
            figures.targets.append(Target(f"{name}, of {text}", goal, ratio))
    figures.set_ratio("write_vs_raw_nixl_threads", "write", _THREADS)
    figures.set_ratio("paused_vs_gloo_broadcast", "paused", "gloo_broadcast")
    figures.targets += targets(figures)
    cpu = figures.facts.get("cpu", {})
    if "python_s_per_push" in cpu:
        first, last = cpu["python_s_first"], cpu["python_s_last"]
        name = "CPU a push of small tensors, of the first and of the last, lower / higher"
        figures.targets.append(Target(name, 0.8, min(first, last) / max(first, last)))
