"""What ``weightsync plan`` would have said of a benchmark's pushes, beside what they took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from weightsync_client.bench.figures import Figures, Target
from weightsync_client.bench.part import Job, Part

_CALL_S = 60.0
#: so few descriptors cost nothing beside their bytes
_FEW = 64


def predict(figures: Figures, trainer: Part | Job, link: str) -> None:
    """Ask for a forecast at rates of this very run.

    Args:
        figures: Have the series ``link`` and ``scan``, and writes in pieces; get the prediction.
        trainer: Has pushed.
        link: The series whose rate is the link's.

    Raises:
        WeightSyncError: There was no push.
    """
    said = trainer.ask(
        "forecast", timeout_s=_CALL_S,
        nic_gbps=figures.series[link].rate * 8 / 1e9,
        write_s=descriptor_seconds(figures.descriptors),
        fill_nbytes_per_s=figures.series["scan"].rate,
    )  # fmt: skip
    figures.predicted = [
        {"what": phase, "predicted": said[key], "measured": figures.median(phase)}
        for phase, key in (("fill", "fill_s"), ("write", "wire_s"))
    ]


def targets(figures: Figures) -> list[Target]:
    """A prediction is met within a fifth, either way."""
    found = []
    for row in figures.predicted:
        low, high = sorted((row["predicted"], row["measured"]))
        name = f"{row['what']}, predicted and measured, lower / higher"
        found.append(Target(name, 0.8, low / high))
    return found


def descriptor_seconds(sweep: Sequence[Mapping[str, Any]]) -> float:
    """What one descriptor costs beside its bytes, of the same bytes in many and in few."""
    few_s = statistics.median(row["seconds"] for row in sweep if row["count"] <= _FEW)
    most = max(sweep, key=lambda row: row["count"])
    return max(float(most["seconds"] - few_s) / float(most["count"]), 0.0)
