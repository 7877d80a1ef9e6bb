"""Grids as they are written on a command line: ``fsdp=64,ep=8`` and ``tp=8,dp=4``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from weightsync.errors import InputError
from weightsync.families.model import Model
from weightsync.families.trainer import TrainerGrid
from weightsync.families.vllm import EngineGrid, engine_layouts
from weightsync.layout import WorkerLayout

_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Inference:
    """``engines`` engines that are alike."""

    engine: EngineGrid
    engines: int = 1

    @property
    def workers(self) -> int:
        """Workers of all engines."""
        return self.engine.workers * self.engines

    def layouts(self, model: Model) -> list[WorkerLayout]:
        """Every worker's layout; workers of other engines share the content of the first's."""
        first = engine_layouts(model, self.engine)
        return [
            replace(layout, place=replace(layout.place, engine=engine))
            for engine in range(self.engines)
            for layout in first
        ]


def trainer_grid(text: str) -> TrainerGrid:
    """Read ``fsdp=64,ep=8``; also ``replicate`` (or ``hsdp``), ``tp`` and ``pp``.

    Raises:
        InputError: An unknown key, a key twice, a size below 1, or sizes that do not fit.
    """
    sizes = _sizes(text, "--trainer", ("fsdp", "replicate", "hsdp", "tp", "ep", "pp"))
    if "hsdp" in sizes:
        if "replicate" in sizes:
            raise InputError(
                f"--trainer {text!r} has hsdp and replicate",
                hint="they are the same: the copies of the shards",
            )
        sizes["replicate"] = sizes.pop("hsdp")
    return TrainerGrid(**sizes)


def inference_grid(text: str) -> Inference:
    """Read ``tp=8,dp=4``; also ``ep``, ``pp`` and ``engines``.

    ``dp`` counts the copies of all engines together.  With ``ep`` (which is ``tp`` times the
    copies in one engine) the experts of an engine are spread whole over its workers.  Without
    ``engines`` there are as many as can be: one a copy, or one for each ``ep`` workers.

    Raises:
        InputError: An unknown key, a key twice, a size below 1, or sizes that do not fit.
    """
    sizes = _sizes(text, "--inference", ("tp", "dp", "ep", "pp", "engines"))
    tp, ep, pp = (sizes.get(key, 1) for key in ("tp", "ep", "pp"))
    a_engine = ep // tp if ep > 1 else None
    if ep > 1 and ep % tp:
        raise InputError(
            f"--inference {text!r}: ep={ep} is no multiple of tp={tp}",
            hint="the experts of an engine are spread over tp times its data-parallel copies",
        )
    dp = sizes.get("dp", (a_engine or 1) * sizes.get("engines", 1))
    engines = sizes.get("engines", dp // a_engine if a_engine else dp)
    if engines < 1 or dp % engines or (a_engine is not None and dp // engines != a_engine):
        raise InputError(
            f"--inference {text!r}: {dp} copies do not make "
            + (f"engines of {a_engine} (ep / tp)" if a_engine else f"{engines} equal engines"),
            hint="dp counts the copies of all engines together",
        )
    return Inference(EngineGrid(tp, dp // engines, pp, expert_parallel=ep > 1), engines)


def _sizes(text: str, option: str, keys: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in keys:
            near = difflib.get_close_matches(key, keys)
            raise InputError(
                f"{option} {text!r}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else ""),
                hint=f"write KEY=SIZE,...; keys: {', '.join(keys)}",
            )
        if key in sizes:
            raise InputError(f"{option} {text!r} has {key} twice", hint="give every key once")
        if not (
            value.isascii() and value.isdigit() and len(value) < 8 and 0 < int(value) <= _MAX_SIZE
        ):
            raise InputError(
                f"{option} {text!r}: {key} is {value!r}", hint="sizes are whole numbers from 1 on"
            )
        sizes[key] = int(value)
    return sizes
