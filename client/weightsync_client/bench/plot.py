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

    rows = answer["descriptors"]
    series = answer["seconds"]
    figure = Figure(figsize=(11, 4.2), dpi=_DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    phases = [phase for phase in PHASES if phase in series]
    others = [name for name, each in series.items() if each["nbytes"] and name not in phases]
    names = [*phases, *others] if phases else list(series)
    medians = [series[name]["median"] * 1e3 for name in names]
    errors = [
        [(series[name]["median"] - series[name]["low"]) * 1e3 for name in names],
        [(series[name]["high"] - series[name]["median"]) * 1e3 for name in names],
    ]
    colors = ["tab:blue" if name in (*PHASES, "push") else "tab:gray" for name in names]
    left.barh(names, medians, xerr=errors, color=colors)
    left.invert_yaxis()
    left.set_xlabel("milliseconds (median; whiskers: lowest and highest)")
    left.set_title(f"bench {answer['bench']}: phases of a push, and baselines")
    if rows:
        right.plot(
            [row["nbytes"] for row in rows],
            [row["gbytes_per_s"] for row in rows],
            marker="o",
            color="tab:gray",
            label="raw NIXL",
        )
        write = series.get("write")
        if write is not None:
            rate = write["gbytes_per_s"]
            right.axhline(rate, color="tab:blue", label="write phase of a push")
        right.set_xscale("log", base=2)
        right.set_ylim(bottom=0)
        right.set_xlabel("bytes of a descriptor")
        right.legend()
    elif answer.get("sizes"):
        sizes = answer["sizes"]
        for what in ("plan", "proof"):
            medians = [size[what]["median"] for size in sizes]
            right.plot([size["tensors"] for size in sizes], medians, marker="o", label=what)
        right.set_xlabel("checkpoint tensors")
        right.legend()
    right.set_ylabel("GB/s" if rows else "seconds")
    figure.savefig(path)
