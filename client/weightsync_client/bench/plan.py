"""``weightsync bench plan``: what planning and the proof cost, against the number of tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from weightsync.families.config import ModelConfig
from weightsync.families.grids import inference_grid, trainer_grid
from weightsync_client.bench import models
from weightsync_client.bench.figures import Case, Figures, Target, run_rounds
from weightsync_client.plan_command import SCALES, no_collector, plan_job


class PlanOptions(BaseModel):
    """One run of ``bench plan``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_file: Path | None = None
    """The model's Hugging Face ``config.json``; None: 128 experts in each of 48 layers."""
    trainer: str = "fsdp=64,ep=8"
    """The trainer's ranks, as ``weightsync plan`` takes them."""
    inference: str = "tp=4,dp=8,ep=4"
    """The engines' workers, likewise."""
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    """Rounds that count; every size is planned once in each."""
    warmup: Annotated[int, Field(ge=0, le=100)] = 1
    """Rounds before them."""


def run_plan(options: PlanOptions, told: Callable[[str], None]) -> Figures:
    """Plan the model with an eighth of its layers, a quarter, a half and all, in turn.

    Args:
        options: What, and how often.
        told: Is told what runs.

    Raises:
        InputError: The model cannot be planned on these grids.
    """
    config = (
        ModelConfig(models.many_experts())
        if options.config_file is None
        else ModelConfig.read(options.config_file)
    )
    trainer, inference = trainer_grid(options.trainer), inference_grid(options.inference)
    layers = config.size("num_hidden_layers")
    shapes: dict[int, dict[str, Any]] = {}

    def case(size: int) -> Case:
        cut = ModelConfig({**config.values, "num_hidden_layers": size}, config.where)

        def run() -> dict[str, float]:
            with no_collector():
                outcome = plan_job(cut, trainer, inference)
            shapes[size] = {"tensors": len(outcome.model.manifest), "runs": outcome.runs}
            return {f"plan {size}": outcome.plan_s, f"proof {size}": outcome.proof_s}

        return run

    sizes = sorted({max(1, round(layers * part)) for part in SCALES})
    cases = {f"{size} layers": case(size) for size in sizes}
    figures = Figures("plan", facts={"rounds": options.rounds, "warmup": options.warmup})
    run_rounds(
        figures,
        cases,
        rounds=options.rounds,
        warmup=options.warmup,
        nbytes={},
        essential=list(cases),
        told=told,
    )
    spreads = {name: series.to_dict() for name, series in figures.series.items()}
    rows = [
        {"layers": size, **shapes[size], **{w: spreads[f"{w} {size}"] for w in ("plan", "proof")}}
        for size in sizes
    ]
    figures.facts |= {
        "model": config.values.get("model_type"),
        "trainer": options.trainer,
        "inference": options.inference,
        "sizes": rows,
    }
    figures.series.clear()  # the rows have them
    small, large = rows[0], rows[-1]
    rates = [row["tensors"] / row["plan"]["median"] for row in (large, small)]
    flat = rates[0] / rates[1] if len(rows) > 1 else None
    figures.ratios["tensors_planned_per_s_all_layers_vs_fewest"] = flat
    figures.targets = [Target("tensors planned a second: all layers, of the fewest", 0.67, flat)]
    return figures
