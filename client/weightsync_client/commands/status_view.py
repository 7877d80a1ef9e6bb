"""What ``weightsync status`` shows to a person, once or again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightsync.errors import WeightSyncError
from weightsync_client.report import human_bytes, human_seconds

#: of states; one that is not here is red
_COLORS = {
    "ready": "green",
    "shadowing": "green",
    "paused": "yellow",
    "receiving": "cyan",
    "torn": "bold red",
}
#: of states in which the last error says why
_TROUBLED = ("torn", "detached")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one agent answered; one of ``body`` and ``error`` is there."""

    url: str
    body: dict[str, Any] | None = None
    error: WeightSyncError | None = None

    @property
    def state(self) -> str:
        """The agent's, or why there is none."""
        if self.error is not None:
            return self.error.code
        return str((self.body or {}).get("state", "?"))


def status_table(answers: Sequence[Answer], now: float) -> Table:
    """A row an agent, below a line on all of them.

    Args:
        answers: What the agents said.
        now: Seconds since 1970, to tell how long ago something was.
    """
    table = Table(title=_summary(answers, now), title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("agent", "state", "version", "workers", "last push"):
        table.add_column(head, overflow="fold")
    for answer in answers:
        name = Text(answer.url.removeprefix("http://"))
        if answer.body is not None:
            table.add_row(name, *_cells(answer.body, now))
        else:
            table.add_row(name, Text(f"● {answer.state}", style="bold red"), "", "", "")
    return table


def watched(answers: Sequence[Answer], now: float) -> RenderableType:
    """The table, with what troubles each agent below it."""
    troubles = [f"{a.url}: {text}" for a in answers if (text := trouble(a))]
    return Group(status_table(answers, now), *(Text(t, style="red") for t in troubles))


def trouble(answer: Answer) -> str:
    """Why an agent or its engine does not serve, as far as somebody said so; and what to do."""
    if answer.error is not None:
        code, detail, hint = answer.error.code, answer.error.message, answer.error.hint
    else:
        errors = (answer.body or {}).get("last_errors")
        if answer.state not in _TROUBLED or not errors:
            return ""
        code, detail, hint = (str(errors[-1].get(key, "")) for key in ("code", "detail", "hint"))
    return f"{code}: {detail}" + (f"\n  what to do: {hint}" if hint else "")


def _summary(answers: Sequence[Answer], now: float) -> Text:
    counts = Counter(answer.state for answer in answers)
    told = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    versions = sorted({int(a.body.get("version", 0)) for a in answers if a.body is not None})
    if len(versions) > 1:
        told += f" · versions {versions[0]} to {versions[-1]}"
    return Text(f"{time.strftime('%H:%M:%S', time.localtime(now))}  {told}", style="bold")


def _cells(told: dict[str, Any], now: float) -> list[Text]:
    state = str(told.get("state", "?"))
    version = str(told.get("version", "?"))
    if told.get("target") is not None:
        version += f" → {told['target']}"
    state_text = state
    if state == "paused":
        state_text = "paused by a push" if told.get("pause_owner") else "paused by hand"
    workers = told.get("workers", ())
    kinds = [(k, sum(int(w.get(k, 0)) for w in workers)) for k in ("direct", "staged")]
    kinds.append(("refused", sum(len(w.get("refusals", ())) for w in workers)))
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds if n)
    return [
        Text(f"● {state_text}", style=_COLORS.get(state, "red")),
        Text(version),
        Text(f"{len(workers)}" + (f" ({counts})" if counts else "")),
        Text(_last_push(told.get("last_push"), now)),
    ]


def _last_push(push: dict[str, Any] | None, now: float) -> str:
    if push is None:
        return "none yet"
    version = "?" if push.get("version") is None else push["version"]
    since_s = max(now - float(push.get("started_at", now)), 0.0)
    seconds = push.get("seconds", {})
    phases = push.get("phases", ())
    if phases and phases[-1].get("seconds") is None:
        runs_s = max(since_s - float(phases[-1].get("start_s", 0.0)), 0.0)
        return f"v{version} {phases[-1].get('phase')} for {human_seconds(runs_s)}"
    parts = [f"v{version} {push.get('outcome')} {_ago(since_s)}"]
    if "paused" in seconds:
        parts.append(f"paused {human_seconds(seconds['paused'])}")
    if push.get("nbytes") and seconds.get("write"):
        parts.append(f"{human_bytes(push['nbytes'] / seconds['write'])}/s")
    return " · ".join(parts)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
