"""How a push shows itself while it runs: a live line in a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Literal, Protocol

from rich.console import Console
from rich.status import Status

from weightsync.logs import log_fields
from weightsync_client.report import PushReport, human_bytes, human_seconds

ProgressKind = Literal["auto", "terminal", "log", "off"]

_log = logging.getLogger("weightsync.publisher")


class Progress(Protocol):
    """Told of a push by the publisher, from one thread; none of this may raise."""

    def started(self, phase: str, version: int) -> None:
        """A phase starts.  The version is 0 until it is known."""

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """A phase ended well."""

    def done(self, report: PushReport) -> None:
        """The push is over, well."""

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """The push is over, not well."""


class LogProgress:
    """One log line a phase, ``key=value``, on the logger ``weightsync.publisher``.

    With :class:`weightsync.logs.JsonFormatter` the same fields are one JSON object a line.
    """

    def started(self, phase: str, version: int) -> None:
        """Nothing: a phase is logged when its time is known."""

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """Log the phase's time."""
        log_fields(
            _log, logging.INFO, "push", phase=phase, outcome="ok", version=version,
            push_id=push_id, seconds=seconds, nbytes=nbytes,
        )  # fmt: skip

    def done(self, report: PushReport) -> None:
        """Log the whole push."""
        log_fields(
            _log, logging.INFO, "push", phase="done", outcome="committed", version=report.version,
            push_id=report.push_id, seconds=report.total_s, nbytes=report.nbytes,
            paused_s=report.paused_s, rate_bytes_per_s=round(report.rate_bytes_per_s),
            agents=len(report.agents), dropped=sum(not agent.ok for agent in report.agents),
        )  # fmt: skip

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """Log what ended the push."""
        log_fields(
            _log, logging.ERROR, "push", phase=phase, outcome="failed", version=version,
            push_id=push_id, error=type(error).__name__, detail=str(error),
        )  # fmt: skip


class TerminalProgress:
    """A spinner that names the phase; one line that stays, a push."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console(stderr=True) if console is None else console
        self._status: Status | None = None

    def started(self, phase: str, version: int) -> None:
        """Show the phase."""
        text = f"[bold]weightsync[/] v{version} · {phase}" if version else f"weightsync · {phase}"
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """Nothing: the next phase takes the line."""

    def done(self, report: PushReport) -> None:
        """Leave one line with the push's times."""
        self._stop()
        steps = " · ".join(
            f"{p} {human_seconds(getattr(report, f'{p}_s'))}"
            for p in ("fill", "pause", "write", "commit", "resume")
        )
        self._console.print(
            f"[bold green]✓ v{report.version}[/]  {human_bytes(report.nbytes)}  "
            f"[bold]paused {human_seconds(report.paused_s)}[/]  "
            f"[dim]{steps}[/]  {human_bytes(report.rate_bytes_per_s)}/s",
            highlight=False,
            soft_wrap=True,
        )
        for agent in report.agents:
            if not agent.ok:
                self._console.print(
                    f"  ✗ {agent.url} was dropped in {agent.phase}: {agent.error}",
                    style="yellow",
                    markup=False,
                    soft_wrap=True,
                )

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """Leave one line with what went wrong."""
        self._stop()
        self._console.print(
            f"✗ v{version} failed in {phase}: {error}", style="red", markup=False, soft_wrap=True
        )

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class NoProgress(LogProgress):
    """Silence."""

    def ended(self, phase: str, version: int, push_id: str, seconds: float, nbytes: int) -> None:
        """Nothing."""

    def done(self, report: PushReport) -> None:
        """Nothing."""

    def failed(self, phase: str, version: int, push_id: str, error: BaseException) -> None:
        """Nothing: the error itself says it."""


def make_progress(kind: ProgressKind | Progress) -> Progress:
    """``auto`` is ``terminal`` where stderr is one, else ``log``; what is a Progress stays it."""
    if not isinstance(kind, str):
        return kind
    if kind == "auto":
        kind = "terminal" if sys.stderr.isatty() else "log"
    if kind == "terminal":
        return TerminalProgress()
    return LogProgress() if kind == "log" else NoProgress()
