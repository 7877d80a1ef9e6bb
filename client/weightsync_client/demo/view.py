"""How the demo shows itself: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.panel import Panel
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from weightsync_client.demo.ask import Answer
from weightsync_client.demo.options import DemoOptions
from weightsync_client.report import PHASES, human_bytes, human_seconds

_PICTURE = """\
 trainer ─────HTTP─────▶ agent ──loopback──▶ {engine}
    │                                          ▲
    └────────── one-sided NIXL writes ─────────┘"""
_TOKENS_SHOWN = 4


class View(Protocol):
    """Told of the demo as it goes, from one thread."""

    def opened(self, options: DemoOptions) -> None:
        """The demo begins."""

    def working(self, what: str) -> None:
        """Something that takes a while begins."""

    def done(self, what: str) -> None:
        """That has ended well."""

    def phase(self, version: int, phase: str, seconds: float | None) -> None:
        """A phase of a push begins (``seconds`` None) or has ended."""

    def pushed(self, report: Mapping[str, Any]) -> None:
        """A push has committed."""

    def answered(self, version: int, answer: Answer) -> None:
        """What the engine now answers to the first prompt."""

    def refused(self, refusals: Sequence[Mapping[str, str]], *, old_weights_served: bool) -> None:
        """The push was refused."""

    def proven(self, checks: Sequence[tuple[str, bool]]) -> None:
        """The end: what was checked, and whether it holds."""

    def close(self) -> None:
        """Nothing moves any more."""


class PlainView:
    """Lines with the seconds since the start.

    Args:
        out: Where they go.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._start = time.monotonic()

    def opened(self, options: DemoOptions) -> None:
        """One line."""
        self._line(f"weightsync demo: trainer -> agent -> {options.engine}")

    def working(self, what: str) -> None:
        """One line."""
        self._line(f"{what} ...")

    def done(self, what: str) -> None:
        """One line."""
        self._line(what)

    def phase(self, version: int, phase: str, seconds: float | None) -> None:
        """Nothing: the push's line has all phases."""

    def pushed(self, report: Mapping[str, Any]) -> None:
        """One line with all phases."""
        self._line(f"pushed v{report['version']}: {_size(report)} ({_phases(report)})")

    def answered(self, version: int, answer: Answer) -> None:
        """One line."""
        self._line(f"the engine with v{version} answers {_answer(answer)}")

    def refused(self, refusals: Sequence[Mapping[str, str]], *, old_weights_served: bool) -> None:
        """A line a tensor."""
        for refusal in refusals:
            self._line(f"refused {refusal['tensor']}: {refusal['reason']}")
        if old_weights_served:
            self._line("the engine still serves its old weights: same log probabilities")

    def proven(self, checks: Sequence[tuple[str, bool]]) -> None:
        """A line a check."""
        for text, holds in checks:
            self._line(f"{'ok' if holds else 'FAILED'}: {text}")

    def close(self) -> None:
        """Nothing."""

    def _line(self, text: str) -> None:
        self._out.write(f"[{time.monotonic() - self._start:6.1f} s] {text}\n")
        self._out.flush()


class TerminalView:
    """A spinner with what is going on; what has ended stays above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner: Progress | None = None
        self._since = self._start = time.monotonic()
        self._phases: dict[str, float] = {}

    def opened(self, options: DemoOptions) -> None:
        """The picture of the processes."""
        engine: str = options.engine
        if options.workers > 1:
            engine = f"{engine} × {options.workers}"
        if options.replicas > 1:
            engine = f"{engine}, {options.replicas} engines"
        picture = Text(_PICTURE.format(engine=engine))
        picture.highlight_regex(r"trainer|agent|vllm.*|torch", "bold cyan")
        picture.highlight_regex("one-sided NIXL writes", "magenta")
        title = "[bold]weightsync demo[/] · new weights into a running engine"
        self._console.print(Panel(picture, title=title, border_style="dim", expand=False))

    def working(self, what: str) -> None:
        """Spin."""
        self._since = time.monotonic()
        self._spin(what)

    def done(self, what: str) -> None:
        """A green check, and how long it took."""
        self._still()
        took = human_seconds(time.monotonic() - self._since)
        self._print(Text.assemble((" ✓ ", "green"), what, (f"  {took}", "dim")))

    def phase(self, version: int, phase: str, seconds: float | None) -> None:
        """The push's line grows."""
        if seconds is not None:
            self._phases[phase] = seconds
            return
        if phase == "status":
            self._phases = {}
        ended = "".join(f"{name} {human_seconds(s)} · " for name, s in self._phases.items())
        self._spin(f"v{version}  {ended}[bold]{phase}[/] …")

    def pushed(self, report: Mapping[str, Any]) -> None:
        """The push's line as it stays."""
        self._still()
        self._phases = {}
        line = Text.assemble((f" ● v{report['version']} ", "bold green"), "pushed  ", _size(report))
        line.highlight_regex(r"paused [\d.]+ \S+", "bold")
        self._print(line)
        self._print(Text.assemble("   ", (_phases(report), "dim")))

    def answered(self, version: int, answer: Answer) -> None:
        """Tokens and log probabilities."""
        self._still()
        self._print(Text.assemble((f"   v{version} answers ", "dim"), (_answer(answer), "cyan")))

    def refused(self, refusals: Sequence[Mapping[str, str]], *, old_weights_served: bool) -> None:
        """A table of tensors and reasons."""
        self._still()
        table = Table("kernel tensor", "why it cannot be written", title="refused")
        for refusal in refusals:
            table.add_row(Text(refusal["tensor"]), Text(refusal["reason"]))
        self._console.print(table)
        if old_weights_served:
            text = "the engine still serves its old weights: same log probabilities"
            self._print(Text.assemble((" ✓ ", "green"), text))

    def proven(self, checks: Sequence[tuple[str, bool]]) -> None:
        """A table with a mark each."""
        self._still()
        table = Table(show_header=False, box=None, padding=(0, 1))
        for text, holds in checks:
            mark = Text("✓", "bold green") if holds else Text("✗", "bold red")
            table.add_row(mark, Text(text, "" if holds else "red"))
        good = all(holds for _, holds in checks)
        took = human_seconds(time.monotonic() - self._start)
        style, verdict = ("green", "proven") if good else ("red", "not proven")
        title = f"[bold {style}]{verdict}[/] · {took}"
        self._console.print(Panel(table, title=title, border_style=style, expand=False))

    def close(self) -> None:
        """Stop the spinner."""
        self._still()

    def _spin(self, markup: str) -> None:
        if self._spinner is None:
            self._spinner = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._spinner.add_task(markup, total=None)
            self._spinner.start()
        else:
            self._spinner.update(self._spinner.task_ids[0], description=markup)

    def _still(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)


def _size(report: Mapping[str, Any]) -> str:
    rate = human_bytes(report.get("rate_bytes_per_s", 0.0))
    paused = human_seconds(report["paused_s"])
    return f"{human_bytes(report['nbytes'])} written at {rate}/s, paused {paused}"


def _phases(report: Mapping[str, Any]) -> str:
    return " · ".join(
        f"{name} {human_seconds(seconds)}"
        for name in PHASES
        if (seconds := report.get(f"{name}_s", 0.0)) > 0
    )


def _answer(answer: Answer) -> str:
    tokens = " ".join(str(t) for t in answer.tokens[:_TOKENS_SHOWN])
    logprobs = " ".join(f"{x:.4f}" for x in answer.logprobs[:_TOKENS_SHOWN])
    return f"tokens {tokens} …  logprobs {logprobs} …"
