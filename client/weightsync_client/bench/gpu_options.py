"""The options of ``weightsync bench gpu``."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

CaseName = Literal[
    "dense", "expandable", "slots", "cpu", "shadow", "moe", "fp8", "split", "vllm_nccl"
]
CASES: tuple[CaseName, ...] = get_args(CaseName)
#: cases that need more GPUs than some machines have: their absence is no failure
MAY_LACK: frozenset[str] = frozenset({"vllm_nccl", "split"})


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
    """``cpu`` runs the same cases with tiny models and the embedded engine, as a test."""
