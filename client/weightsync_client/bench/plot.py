"""A picture of a benchmark: seconds of the phases, and the rate against the size of a descriptor.

matplotlib is an extra: ``pip install 'weightsync[bench]'``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from weightsync.errors import InputError
from weightsync_client.report import PHASES

#: of a bar and its name
_BAR_INCHES = 0.19
_DOTS_PER_INCH = 130


def check_plot(path: Path) -> None:
    """Whether a plot can be drawn there.

    Raises:
        InputError: matplotlib is missing, the folder is, or the file is no PNG.
    """
    if path.suffix != ".png":
        raise InputError(f"--plot {path}: a PNG is drawn", hint="name a file that ends in .png")
    if not path.parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.parent}", hint="make it first")
    if find_spec("matplotlib") is None:
        raise InputError(
            "--plot needs matplotlib, which is not installed",
            hint="pip install 'weightsync[bench]', or leave --plot out",
        )


def draw(answer: Mapping[str, Any], path: Path) -> None:
    """Draw what ``--json`` prints into a PNG file."""
    from matplotlib.figure import Figure

    panels = [
        panel
        for panel, key in (
            (_durations, "seconds"), (_descriptors, "descriptors"), (_planning, "sizes")
        )
        if answer.get(key)
    ]  # fmt: skip
    bars = len(_shown(answer["seconds"])) if answer.get("seconds") else 0
    size = (5.5 * max(len(panels), 1), max(4.5, _BAR_INCHES * bars))
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    for k, panel in enumerate(panels):
        panel(figure.add_subplot(1, len(panels), k + 1), answer)
    figure.savefig(path)


def _shown(series: Mapping[str, Any]) -> list[str]:
    """The phases of a push, and what else moves bytes."""
    ours = [name for name in (*PHASES, "push") if name in series]
    return [*ours, *(n for n, one in series.items() if one["nbytes"] and n not in ours)]


def _durations(axes: Any, answer: Mapping[str, Any]) -> None:
    series = answer["seconds"]
    names = _shown(series)
    ours = (*PHASES, "push")
    medians = [series[name]["median"] * 1e3 for name in names]
    whiskers = [
        [(series[name]["median"] - series[name]["low"]) * 1e3 for name in names],
        [(series[name]["high"] - series[name]["median"]) * 1e3 for name in names],
    ]
    axes.barh(names, medians, color=["tab:blue" if name in ours else "silver" for name in names])
    axes.errorbar(medians, names, xerr=whiskers, fmt="none", color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds: median, lowest, highest")
    axes.set_title(f"bench {answer['bench']}: a push and its baselines")


def _descriptors(axes: Any, answer: Mapping[str, Any]) -> None:
    rows, write = answer["descriptors"], answer["seconds"].get("write")
    sizes = [row["nbytes"] for row in rows]
    axes.plot(sizes, [row["gbytes_per_s"] for row in rows], "o-", color="gray", label="raw NIXL")
    if write is not None:
        axes.axhline(write["gbytes_per_s"], color="tab:blue", label="write phase of a push")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes of a descriptor")
    axes.set_ylabel("GB/s")
    axes.set_title("Rate of a write in pieces")
    axes.legend()


def _planning(axes: Any, answer: Mapping[str, Any]) -> None:
    sizes = answer["sizes"]
    for what in ("plan", "proof"):
        medians = [size[what]["median"] for size in sizes]
        axes.plot([size["tensors"] for size in sizes], medians, "o-", label=what)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("checkpoint tensors")
    axes.set_ylabel("seconds")
    axes.set_title("bench plan")
    axes.legend()
