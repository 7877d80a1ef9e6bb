"""``weightsync plan``: what a push of a model would be, from its config and two grids alone."""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from weightsync.errors import InputError
from weightsync.families import ModelConfig, declare
from weightsync.families.grids import Inference, inference_grid, trainer_grid
from weightsync.families.model import Model
from weightsync.families.trainer import TrainerGrid, holdings
from weightsync.forecast import FILL_NBYTES_PER_S, Forecast, Spread, forecast
from weightsync.layout import WorkerLayout
from weightsync.plan import COALESCE_NBYTES, Job
from weightsync_client.commands.common import AsJson, errors_told, print_json
from weightsync_client.report import human_bytes, human_seconds

#: parts of a model's layers at which planning time is shown
SCALES = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Outcome:
    """A planned job and how long it took.

    ``plan_s`` is all that one rank does, from the config to its plan; ``proof_s`` the coverage
    proof of all ranks.
    """

    model: Model
    layouts: Sequence[WorkerLayout]
    ranks: int
    figures: Forecast
    runs: int
    plan_s: float
    plan_cpu_s: float
    proof_s: float

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        figures = self.figures
        checked = sum(_loaded_nbytes(layout) for layout in self.layouts)
        return {
            "model": self.model.family,
            "ranks": self.ranks,
            "workers": len(self.layouts),
            "tensors": len(self.model.manifest),
            "slots": figures.slots,
            "writes": figures.writes,
            "bytes_total": figures.nbytes,
            "gathered_bytes": figures.gathered_nbytes,
            "balance": figures.rank_nbytes.balance,
            "handles_per_rank": int(figures.handles.max),
            "slot_bytes_per_rank": int(figures.slot_nbytes.max),
            "rounds": figures.rounds,
            "plan_seconds": self.plan_s,
            "plan_cpu_seconds": self.plan_cpu_s,
            "predicted": {
                "fill_seconds": figures.fill_s,
                "wire_seconds": figures.wire_s,
                "total_seconds": figures.fill_s + figures.wire_s,
            },
            "proof": {
                "complete": True,
                "seconds": self.proof_s,
                "runs": self.runs,
                "bytes": checked,
                "workers": len(self.layouts),
            },
            "per_rank": {
                "bytes_out": _spread(figures.rank_nbytes),
                "writes": _spread(figures.rank_writes),
                "slot_bytes": _spread(figures.slot_nbytes),
                "handles": _spread(figures.handles),
            },
            "per_worker": {"bytes_in": _spread(figures.worker_nbytes)},
            "peak_memory_bytes": _peak_nbytes(),
        }


def plan_job(
    config: ModelConfig,
    trainer: TrainerGrid,
    inference: Inference,
    *,
    wire_dtype: str = "bf16",
    nic_gbps: float = 400.0,
    fill_gbytes_per_s: float = FILL_NBYTES_PER_S / 1e9,
    max_slot_nbytes: int | None = None,
    coalesce_nbytes: int = COALESCE_NBYTES,
) -> Outcome:
    """Plan one rank, prove the job, and add it all up.

    Raises:
        WeightSyncError: The model cannot be planned on these grids.
    """
    begin, cpu = time.perf_counter(), time.process_time()
    model = declare(config, wire_dtype=wire_dtype)
    layouts = inference.layouts(model)
    job = Job.of(model.manifest, layouts, holdings(model, trainer), coalesce_nbytes=coalesce_nbytes)
    job.plan(0, max_slot_nbytes=max_slot_nbytes)
    planned, cpu = time.perf_counter(), time.process_time() - cpu
    job.prove()
    proven = time.perf_counter()
    figures = forecast(
        job,
        layouts,
        trainer.ranks,
        nic_gbps=nic_gbps,
        fill_nbytes_per_s=fill_gbytes_per_s * 1e9,
        max_slot_nbytes=max_slot_nbytes,
    )
    return Outcome(
        model,
        layouts,
        trainer.ranks,
        figures,
        len(job.runs.starts),
        planned - begin,
        cpu,
        proven - planned,
    )


def plan(
    model_config: Annotated[
        Path, typer.Option(metavar="CONFIG.json", help="The model's Hugging Face config.json.")
    ],
    trainer: Annotated[
        str, typer.Option(metavar="KEY=N,...", help="Keys: fsdp, hsdp (copies), tp, ep, pp.")
    ],
    inference: Annotated[
        str,
        typer.Option(metavar="KEY=N,...", help="Keys: tp, dp (copies in all), ep, pp, engines."),
    ],
    wire_dtype: Annotated[
        str, typer.Option(help="bf16, or fp8: linear layers as blocks with scales.")
    ] = "bf16",
    nic_gbps: Annotated[
        float, typer.Option(help="Gigabits a second of the NIC of each rank and worker.")
    ] = 400.0,
    fill_gbytes_per_s: Annotated[
        float, typer.Option(help="Gigabytes of slots that a rank fills in a second.")
    ] = FILL_NBYTES_PER_S / 1e9,
    max_slot_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Bound of a rank's slot memory: the rest goes in rounds."),
    ] = None,
    coalesce_bytes: Annotated[
        int, typer.Option(min=0, help="Smaller tensors are gathered on one rank; 0: none.")
    ] = COALESCE_NBYTES,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Show how planning time grows with the model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Plan a push without a GPU, an engine or a training job, and prove that it would be whole.

    The engine's layout is the declared one of the model's family; a real push takes it from the
    engine itself.  Times are predictions: slots filled at the given rate, then bytes over the
    busiest NIC plus 5.5 µs a write.

    Exit status: 0 the plan is whole; 1 it is not; 2 bad arguments, or a model that these grids
    do not divide.
    """
    with errors_told("plan", as_json=as_json):
        _positive("--nic-gbps", nic_gbps)
        _positive("--fill-gbytes-per-s", fill_gbytes_per_s)
        config = ModelConfig.read(model_config)
        grids = trainer_grid(trainer), inference_grid(inference)
        layers = config.size("num_hidden_layers")
        sizes = sorted({max(1, round(layers * part)) for part in SCALES}) if scaling else [layers]
        outcomes = []
        for size in sizes:
            cut = ModelConfig({**config.values, "num_hidden_layers": size}, config.where)
            with no_collector():
                outcomes.append(
                    plan_job(
                        cut,
                        *grids,
                        wire_dtype=wire_dtype,
                        nic_gbps=nic_gbps,
                        fill_gbytes_per_s=fill_gbytes_per_s,
                        max_slot_nbytes=max_slot_bytes,
                        coalesce_nbytes=coalesce_bytes,
                    )
                )
    outcome = outcomes[-1]
    if as_json:
        answer = outcome.to_dict()
        if scaling:
            answer["scaling"] = [_scale(other) for other in outcomes]
        print_json(answer)
        return
    console = Console()
    console.print(_summary(outcome, nic_gbps))
    console.print(_loads(outcome.figures))
    if scaling:
        console.print(_scaling(outcomes))
    console.print(
        f"[bold green]Whole:[/] every byte of {len(outcome.layouts):,} workers is written exactly "
        f"once, by {outcome.ranks:,} ranks."
    )


def _positive(option: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{option} is {value}", hint="a rate is more than 0")


@contextmanager
def no_collector() -> Iterator[None]:
    """Millions of small records and no cycles: the collector would only walk them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# ------------------------------------------------------------------ figures for people


def _summary(outcome: Outcome, nic_gbps: float) -> Table:
    figures, model = outcome.figures, outcome.model
    table = Table(title="One push", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    rows = (
        ("model", model.family, f"{model.layers} layers, {human_bytes(model.manifest.nbytes)}"),
        ("ranks → workers", f"{outcome.ranks:,} → {len(outcome.layouts):,}", ""),
        ("tensors", f"{len(model.manifest):,}", "checkpoint tensors"),
        ("slots", f"{figures.slots:,}", "contiguous pieces, shared by all engines"),
        ("writes", f"{figures.writes:,}", f"mean {human_bytes(figures.nbytes / figures.writes)}"),
        ("bytes", human_bytes(figures.nbytes), "over the wire"),
        ("gathered", human_bytes(figures.gathered_nbytes), "of small tensors, between the ranks"),
        ("rounds", _count(figures.rounds), "through the slots, of the rank with the most"),
        ("fill", human_seconds(figures.fill_s), "while the engines serve"),
        ("wire", human_seconds(figures.wire_s), f"the pause, at {nic_gbps:g} Gb/s a NIC"),
        (
            "plan of one rank",
            human_seconds(outcome.plan_s),
            f"{human_seconds(outcome.plan_cpu_s)} of CPU",
        ),
        ("proof of the job", human_seconds(outcome.proof_s), f"{outcome.runs:,} runs of bytes"),
        ("memory", human_bytes(_peak_nbytes()), "of this command, at its peak"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _loads(figures: Forecast) -> Table:
    table = Table(title="Loads", title_justify="left")
    table.add_column("")
    for head in ("max", "mean", "min", "max / mean"):
        table.add_column(head, justify="right")
    kinds = (
        ("bytes out of a rank", figures.rank_nbytes, human_bytes),
        ("writes of a rank", figures.rank_writes, _count),
        ("slot memory of a rank", figures.slot_nbytes, human_bytes),
        ("handles of a rank", figures.handles, _count),
        ("bytes into a worker", figures.worker_nbytes, human_bytes),
    )
    for name, spread, show in kinds:
        table.add_row(
            name,
            *(show(value) for value in (spread.max, spread.mean, spread.min)),
            f"{spread.balance:.3f}",
        )
    return table


def _scaling(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="Planning time", title_justify="left")
    for head in ("layers", "tensors", "runs", "plan, CPU", "a tensor", "proof"):
        table.add_column(head, justify="right")
    for outcome in outcomes:
        scale = _scale(outcome)
        table.add_row(
            f"{scale['layers']:,}",
            f"{scale['tensors']:,}",
            f"{outcome.runs:,}",
            human_seconds(outcome.plan_cpu_s),
            human_seconds(outcome.plan_cpu_s / len(outcome.model.manifest)),
            human_seconds(outcome.proof_s),
        )
    return table


def _scale(outcome: Outcome) -> dict[str, Any]:
    return {
        "layers": outcome.model.layers,
        "tensors": len(outcome.model.manifest),
        "runs": outcome.runs,
        "plan_seconds": outcome.plan_s,
        "plan_cpu_seconds": outcome.plan_cpu_s,
        "proof_seconds": outcome.proof_s,
    }


def _spread(spread: Spread) -> dict[str, float]:
    return {"max": spread.max, "mean": spread.mean, "min": spread.min, "balance": spread.balance}


def _loaded_nbytes(layout: WorkerLayout) -> int:
    return sum(
        region.nbytes - sum(stop - start for start, stop in region.untouched)
        for region in layout.regions
    )


def _peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(value: float) -> str:
    return f"{value:,.0f}"
