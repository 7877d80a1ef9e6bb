"""What the demo can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from weightsync.errors import InputError
from weightsync.protocol import PushMode
from weightsync_client.trace import check_trace_file

EngineKind = Literal["vllm", "torch"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["none", "fp8"]
_NVIDIA = Path("/dev/nvidiactl")


class DemoOptions(BaseModel):
    """One run of the demo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: EngineKind = "vllm"
    """Which engine serves the model."""
    config_file: Path | None = None
    """A Hugging Face ``config.json``; None: a tiny Qwen3."""
    pushes: Annotated[int, Field(ge=1, le=1000)] = 3
    """How many times every weight is changed and pushed."""
    packed: bool = True
    """Whether vLLM on CPU packs its linear weights, as it does by default."""
    device: Device = "auto"
    """Where engine and trainer keep the weights; ``auto``: on GPUs where there are some."""
    tp: Annotated[int, Field(ge=1, le=64)] = 1
    """Workers that every engine is split over (tensor parallel)."""
    pp: Annotated[int, Field(ge=1, le=64)] = 1
    """Pipeline stages of every engine."""
    dp: Annotated[int, Field(ge=1, le=64)] = 1
    """Data-parallel copies within every engine."""
    expert_parallel: bool = False
    """Whether an engine's workers share out the experts instead of slicing each."""
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Engines that are pushed to."""
    one_agent: bool = False
    """Whether all engines are behind one agent; else each has an agent of its own."""
    trainer_ranks: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes of the training job; more than one: FSDP2, each holds and pushes its shards."""
    quantization: Quantization = "none"
    """``fp8``: the engine serves fp8 blocks, the trainer keeps bfloat16 and quantises in a push."""
    mode: PushMode = "direct"
    """``shadow``: the engine serves while its new weights are written beside the old ones."""
    workdir: Path | None = None
    """Folder for checkpoints and logs, empty or new, that is kept; None: a temporary one."""
    keep: bool = False
    """Whether the temporary folder stays even if all went well."""
    trace_file: Path | None = None
    """File for the time line of the last push; None: none."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 600.0
    """Seconds for the whole demo (WS-6)."""

    @property
    def cuda(self) -> bool:
        """Whether the weights are on GPUs."""
        return self.device == "cuda" or (self.device == "auto" and _NVIDIA.exists())

    @property
    def workers(self) -> int:
        """Workers of one engine."""
        return self.tp * self.pp * self.dp

    def check(self) -> None:
        """What can be told before anything is started.

        Raises:
            InputError: A value is wrong, or two do not go together.
        """
        if self.engine == "torch" and (self.workers > 1 or self.expert_parallel):
            raise InputError(
                "--engine torch has one worker",
                hint="leave --tp, --pp, --dp and --expert-parallel out, or use vllm",
            )
        check_trace_file(self.trace_file)
        folder = self.workdir
        if folder is not None and folder.exists() and not _is_empty_folder(folder):
            raise InputError(f"--workdir {folder} is not an empty folder", hint="name a new one")
        path = self.config_file
        if path is None:
            return
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read the model config {path}: {error}",
                hint="--model-config takes the config.json of a Hugging Face model",
            ) from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise InputError(
                f"{path} is no Hugging Face config: it has no model_type",
                hint="--model-config takes the config.json of a Hugging Face model",
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
