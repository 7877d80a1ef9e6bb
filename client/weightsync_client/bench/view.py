"""Figures for people: tables for a terminal, and the same ones in Markdown.

Both are made from what ``--json`` prints, so that a stored file gives the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from weightsync_client.report import human_bytes, human_seconds

_MET = {True: "yes", False: "no", None: "not measured"}


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table: the first column is text, the others are figures."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(answer: Mapping[str, Any]) -> Iterator[Sheet]:
    """All tables of one benchmark that have a row."""
    every = (
        Sheet("Targets", ("what", "target", "measured", "met"), list(_targets(answer))),
        Sheet("Seconds", ("what", "median", "lowest", "highest", "rate"), list(_seconds(answer))),
        Sheet("Ratios", ("ours / theirs", "of the rates"), list(_ratios(answer))),
        Sheet("Predicted", ("what", "predicted", "measured"), list(_predicted(answer))),
        Sheet("CPU of the trainer", ("what", "figure"), list(_cpu(answer))),
        Sheet("Planning", _PLAN_HEADS, list(_sizes(answer))),
        Sheet(
            "One raw NIXL write, in pieces", ("piece", "pieces", "seconds", "rate"),
            list(_descriptors(answer)),
        ),
        Sheet("Not measured", ("what", "why"), list(_failed(answer))),
    )  # fmt: skip
    return (sheet for sheet in every if sheet.rows)


def tables(answer: Mapping[str, Any]) -> Iterator[Table]:
    """For a terminal."""
    for sheet in sheets(answer):
        table = Table(title=sheet.title, title_justify="left")
        for k, head in enumerate(sheet.heads):
            figures = k > 0 and sheet.title != "Not measured"
            table.add_column(head, justify="right" if figures else "left")
        for row in sheet.rows:
            table.add_row(*row)
        yield table


def markdown(answer: Mapping[str, Any]) -> str:
    """For a document: what was measured on, then the tables."""
    parts = [_where(answer)]
    for sheet in sheets(answer):
        lines = [
            "| " + " | ".join(sheet.heads) + " |",
            "|" + "---|" * len(sheet.heads),
            *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in sheet.rows),
        ]
        parts.append(f"**{sheet.title}**\n\n" + "\n".join(lines))
    parts += [f"- {note}" for note in answer["notes"]]
    return "\n\n".join(parts) + "\n"


def _where(answer: Mapping[str, Any]) -> str:
    machine = answer["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    said = [f"weightsync {answer['weightsync']}"]
    if answer.get("gpus"):
        said.append(f"{len(answer['gpus'])} × {answer['gpus'][0]}")
    said.append(f"{machine['cpus']} CPU cores, Python {machine['python']}, {packages}")
    if answer.get("engine"):
        said.append(f"engine {answer['engine']}")
    if answer.get("nbytes"):
        said.append(f"{human_bytes(answer['nbytes'])} in {answer['tensors']} checkpoint tensors")
    rounds, warmup = answer["rounds"], answer["warmup"]
    sets = answer.get("sets", 1)
    of = f"in {sets} sets of processes, each " if sets > 1 else ""
    said.append(f"medians of {rounds} rounds {of}after {warmup} of warm-up, all cases in turn")
    return "; ".join(said) + "."


def _targets(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for target in answer["targets"]:
        figure = _seconds_or_none if target["unit"] == "s" else _ratio
        sign = "≤" if target["unit"] == "s" else "≥"
        yield (
            target["what"],
            f"{sign} {figure(target['goal'])}",
            figure(target["measured"]),
            _MET[target["met"]],
        )


def _seconds(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, series in answer["seconds"].items():
        rate = series["gbytes_per_s"]
        yield (
            name,
            human_seconds(series["median"]),
            human_seconds(series["low"]),
            human_seconds(series["high"]),
            f"{rate:.2f} GB/s" if rate else "",
        )


def _predicted(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in answer.get("predicted", ()):
        yield row["what"], human_seconds(row["predicted"]), human_seconds(row["measured"])


def _cpu(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    cpu = answer.get("cpu", {})
    if "write_cpu_s_per_s" in cpu:
        yield "CPU seconds a second of writing", f"{cpu['write_cpu_s_per_s']:.2f}"
    if "python_s_per_push" in cpu:
        what = f"CPU of the pushing thread, {cpu['tensors']} tensors of a few kilobytes"
        yield f"{what}, pushes {cpu['first']}", human_seconds(cpu["python_s_first"])
        yield f"{what}, pushes {cpu['last']}", human_seconds(cpu["python_s_last"])


def _ratios(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, ratio in answer["ratios"].items():
        yield name, _ratio(ratio)


_PLAN_HEADS = ("layers", "tensors", "runs of bytes", "plan", "plan, a tensor", "proof")


def _sizes(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for size in answer.get("sizes", ()):
        yield (
            f"{size['layers']:,}",
            f"{size['tensors']:,}",
            f"{size['runs']:,}",
            human_seconds(size["plan"]["median"]),
            human_seconds(size["plan"]["median"] / size["tensors"]),
            human_seconds(size["proof"]["median"]),
        )


def _descriptors(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in answer["descriptors"]:
        yield (
            human_bytes(row["nbytes"]),
            f"{row['count']:,}",
            human_seconds(row["seconds"]),
            f"{row['gbytes_per_s']:.2f} GB/s",
        )


def _failed(answer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, why in answer["failed"].items():
        yield name, why.splitlines()[0]


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _seconds_or_none(seconds: float | None) -> str:
    return "–" if seconds is None else human_seconds(seconds)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
